// What the emulated library has in place of a GPU: its one thread block, and the limits of the GPU that a test names.

#include "emulated.h"

#include "device/schedule.h"
#include "host/gpu.h"
#include "host/plan.h"
#include "kernels.h"

namespace minilm::cuda {
namespace emulation {

Machine machine;

}  // namespace emulation

namespace {

int64_t per_block = 232448, per_processor = 233472;  // those of sm_90

}  // namespace

const char* find_limits(int, Limits& limits, int& capability) {
  limits = {per_block, per_processor};
  capability = 90;
  return nullptr;
}

bool is_loaded(int, const std::string&) { return true; }

const char* load(int, const std::string&, const void*) { return nullptr; }

const char* launch(int, const Launch& launch, void*) {
  const char* error = nullptr;
  if (launch_fused(launch, error) || launch_rows(launch, error)) return error;
  return "the emulation has no such kernel";
}

}  // namespace minilm::cuda

extern "C" __attribute__((visibility("default"))) void emulated_set_limits(int64_t block, int64_t processor) {
  minilm::cuda::per_block = block;
  minilm::cuda::per_processor = processor;
}

// 0: warps take turns in order; otherwise in an order drawn from the seed.
extern "C" __attribute__((visibility("default"))) void emulated_set_seed(uint64_t seed) {
  minilm::cuda::emulation::machine.seed = seed;
}

// Host functions of csrc/cuda that the tests ask directly.

extern "C" __attribute__((visibility("default"))) int emulated_rounds(int tiles) {
  return minilm::cuda::rounds_of(tiles);
}

extern "C" __attribute__((visibility("default"))) int emulated_pairs(int tiles, int round) {
  return minilm::cuda::pairs_of(tiles, round);
}

extern "C" __attribute__((visibility("default"))) void emulated_tile_pair(int tiles, int round, int pair, int* out) {
  minilm::cuda::TilePair tile = minilm::cuda::tile_pair(tiles, round, pair);
  out[0] = tile.row;
  out[1] = tile.column;
}

// planes: teacher, student, student's chunks, student's pieces; out: tokens, warps, blocks a processor, bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_fused(int64_t block, int64_t processor,
                                                                           const int* planes, int64_t longest,
                                                                           int64_t* out) {
  minilm::cuda::FusedPlan plan =
      minilm::cuda::plan_fused({block, processor}, {planes[0], planes[1], planes[2], planes[3]}, longest);
  out[0] = plan.tokens;
  out[1] = plan.warps;
  out[2] = plan.blocks;
  out[3] = plan.bytes;
}

// out: warps, other tokens, bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_rows(int64_t block, int64_t processor,
                                                                          const int* planes, int gradient,
                                                                          int64_t* out) {
  minilm::cuda::RowsPlan plan =
      minilm::cuda::plan_rows({block, processor}, {planes[0], planes[1], planes[2], planes[3]}, gradient != 0);
  out[0] = plan.warps;
  out[1] = plan.others;
  out[2] = plan.bytes;
}
