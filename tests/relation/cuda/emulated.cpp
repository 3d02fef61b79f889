// What the emulated library has in place of a GPU: its one thread block, and the limits of the GPU that a test names.

#include "emulated.h"
#include "plan.h"
#include "schedule.h"

namespace minilm::cuda {
namespace emulation {

Machine machine;

}  // namespace emulation

namespace {

int64_t per_block = 232448, per_processor = 233472;  // those of sm_90

}  // namespace

const char* find_limits(int, int64_t& shared_per_block, int64_t& shared_per_processor, int& capability) {
  shared_per_block = per_block;
  shared_per_processor = per_processor;
  capability = 90;
  return nullptr;
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

// planes: teacher, student, student's chunks, student's pieces, everyday; out: tokens, warps, blocks a processor, bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_fused(int64_t block, int64_t processor,
                                                                           const int* planes, int64_t longest,
                                                                           int64_t* out) {
  minilm::cuda::FusedPlan plan =
      minilm::cuda::plan_fused({block, processor}, {planes[0], planes[1], planes[2], planes[3], planes[4] != 0}, longest);
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
      minilm::cuda::plan_rows({block, processor}, {planes[0], planes[1], planes[2], planes[3], planes[4] != 0}, gradient != 0);
  out[0] = plan.warps;
  out[1] = plan.others;
  out[2] = plan.bytes;
}
