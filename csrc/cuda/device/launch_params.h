// Parameters of the kernels, passed by value, and constants that host and device share.
#pragma once

#include "common/relation.h"

namespace minilm::cuda {

constexpr int kTile = 32;          // tokens of a tile: a warp processes 32 × 32 pairs at a time
constexpr int kMaxRelations = 16;  // relations of a launch, limited by the 4 KiB of kernel parameters

// Warps per block of the symmetric kernel, indexed by the student's number of bf16 splits. The kernel is compiled for
// this many warps, which share the 65 536 registers of an SM. docs/cuda.md lists the registers that it uses.
constexpr int kSymmetricWarps[] = {0, 12, 12, 8};
constexpr int kRowWiseWarps = 4;  // warps per block; two blocks run on an SM

// Parts of the shared memory of a symmetric block.
constexpr int kBlockStateBytes = 128, kScratchBytes = 128;

struct LaunchParams {
  Call call;
  Relation relations[kMaxRelations];
  int32_t num_relations;
  int32_t capacity;    // tokens in shared memory; symmetric: those of the sequence; row-wise: those of a streamed tile
  int64_t min_length;  // sequences outside min_length ... max_length are skipped
  int64_t max_length;
  double* partials;  // [R][slots]: weighted KL divergence of each block
  int64_t slots, first_slot;
  float* row_stats;  // row-wise: [4][R][A][positions of all sequences], the arrays of RowStats
  int64_t row_stats_stride;
  int32_t keys;  // row-wise: 1 if a block's own tokens are the keys of a cross relation
};
static_assert(sizeof(LaunchParams) <= 4096, "kernel parameters");

// Parameters of the kernel that adds up the partial sums of all blocks.
struct ReduceParams {
  Call call;
  const double* partials;
  int64_t slots, symmetric_slots;
  int32_t num_relations;
  int32_t index[kMaxRelations];
  bool symmetric[kMaxRelations], row_wise[kMaxRelations];  // kernels that have written partial sums
};

}  // namespace minilm::cuda
