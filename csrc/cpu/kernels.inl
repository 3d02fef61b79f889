// The CPU kernels, written once for a vector F of V floats. Each kernels_*.cpp includes this file after the vector type
// of its instruction set. docs/mathematics.md derives the formulas, docs/cpu.md counts the cost of each step.
//
// Everything except the table at the end has internal linkage: the linker must not replace a function compiled for one
// instruction set by the same function compiled for another.

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"

namespace {

using namespace minilm;
using namespace minilm::cpu;

constexpr int R = kRowBlock;
constexpr int64_t kPanelBlocks = 16;      // key blocks whose scores are in memory at the same time
constexpr int64_t kSweepBlocks = 64 / V;  // key blocks that stay in the cache for all rows of a row block
constexpr int kSumRows = 4;               // rows whose sums stay in registers

static_assert(R % kTileRows == 0 && R % kSumRows == 0 && R % kGradientRows == 0 && V % kTileRows == 0, "");

}  // namespace

#include "exp2.inl"
#include "gather.inl"
#include "gradients.inl"
#include "row_wise.inl"
#include "scores.inl"
#include "symmetric.inl"

namespace minilm::cpu {

const Kernels MINILM_KERNELS = {
    V,
    2 * kPanelBlocks * R * V,
    token_floats,
    gather,
    range,
    center,
    shift,
    center_keys,
    symmetric_sums,
    symmetric_rows,
    symmetric_gradient,
    row_wise,
    scatter,
};

}  // namespace minilm::cpu
