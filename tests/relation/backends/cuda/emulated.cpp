// Implements host/gpu.h with the emulated thread block, and exports functions for tests.

#include "emulated.h"

#include <utility>

#include "cuda/device/schedule.cuh"
#include "cuda/host/launch_plan.h"
#include "kernels.h"

namespace minilm::cuda {
namespace emulation {

Machine machine;

}  // namespace emulation

namespace {

int segment_launches = 0;
DeviceProps device_props{232448, 233472, kCapability, 132};  // an H100's, or B200's, shared memory

}  // namespace

const char* get_device_props(int, DeviceProps& props) {
  props = device_props;
  return nullptr;
}

bool is_loaded(int, const std::string&) { return true; }

const char* load(int, const std::string&, const void*) { return nullptr; }

const char* launch(int, const Launch& launch, void*) {
  if (launch.kernel.find("segments") == 0) ++segment_launches;
  const char* error = nullptr;
  if (launch_symmetric(launch, error) || launch_segments(launch, error) || launch_row_wise(launch, error)) return error;
  return "the emulation has no such kernel";
}

}  // namespace minilm::cuda

extern "C" __attribute__((visibility("default"))) void emulated_set_props(int64_t smem_per_block, int64_t smem_per_sm,
                                                                          int processors) {
  minilm::cuda::device_props = {smem_per_block, smem_per_sm, minilm::cuda::kCapability, processors};
}

// With seed 0, warps run in order; with other seeds, they run in a random order.
extern "C" __attribute__((visibility("default"))) void emulated_set_seed(uint64_t seed) {
  minilm::cuda::emulation::machine.seed = seed;
}

// The race check ignores a barrier of each block of a kernel, counted from 1; 0: none. Returns the most barriers of a
// block of the kernel since the last call.
extern "C" __attribute__((visibility("default"))) int emulated_ignore_barrier(const char* kernel, int barrier) {
  minilm::cuda::emulation::machine.watched = kernel;
  minilm::cuda::emulation::machine.ignored_barrier = barrier;
  return std::exchange(minilm::cuda::emulation::machine.most_barriers, 0);
}

// The number of launches of segment kernels since the last call.
extern "C" __attribute__((visibility("default"))) int emulated_take_segments() {
  return std::exchange(minilm::cuda::segment_launches, 0);
}

// Host functions of csrc/cuda that tests call directly.

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

extern "C" __attribute__((visibility("default"))) int emulated_partner(int strips, int strip, int round) {
  return minilm::cuda::partner_of(strips, strip, round);
}

// `planes` has the fields of Planes. `out` receives tokens, warps, blocks per SM and bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_symmetric(int64_t block, int64_t processor,
                                                                               const int* planes, int64_t max_length,
                                                                               int64_t* out) {
  minilm::cuda::SymmetricPlan plan = minilm::cuda::plan_symmetric(
      {block, processor, 90, 132}, {planes[0], planes[1], planes[2], planes[3], {planes[4], planes[5]}}, max_length);
  out[0] = plan.tokens;
  out[1] = plan.warps;
  out[2] = plan.blocks;
  out[3] = plan.bytes;
}

// The same fields as for the symmetric kernel: tokens of a window, warps, blocks per SM and bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_segments(int64_t block, int64_t processor,
                                                                              const int* planes, int64_t,
                                                                              int64_t* out) {
  minilm::cuda::SegmentPlan plan = minilm::cuda::plan_segments(
      {block, processor, 90, 132}, {planes[0], planes[1], planes[2], planes[3], {planes[4], planes[5]}});
  out[0] = plan.window;
  out[1] = plan.warps;
  out[2] = plan.blocks;
  out[3] = plan.bytes;
}

extern "C" __attribute__((visibility("default"))) int emulated_plan_parts(int processors, int64_t heads,
                                                                          int64_t windows) {
  return minilm::cuda::plan_parts({0, 0, 90, processors}, heads, windows);
}

// `out` receives warps, streamed tokens and bytes.
extern "C" __attribute__((visibility("default"))) void emulated_plan_row_wise(int64_t block, int64_t processor,
                                                                              const int* planes, int gradient,
                                                                              int64_t* out) {
  minilm::cuda::RowWisePlan plan = minilm::cuda::plan_row_wise(
      {block, processor, 90, 132}, {planes[0], planes[1], planes[2], planes[3], {planes[4], planes[5]}}, gradient != 0);
  out[0] = plan.warps;
  out[1] = plan.streamed;
  out[2] = plan.bytes;
}
