// The emulated segment kernel. Only shapes with strips have one.

#include "cuda/device/segments.cuh"

#include <cstdio>

#include "kernels.h"

namespace minilm::cuda {
namespace {

template <int kFormat, int kChunksT, int kFormatT, int kChunksS, bool kCausal>
void segments(const LaunchParams params) {
  SegmentKernel<kFormat, kChunksT, kFormatT, kChunksS, kCausal>::run(params, shared_memory());
}

template <bool kCausal>
void (*kernel_of(const std::string& name))(const LaunchParams) {
  if (name.find("segments_1_2_1_1_") == 0) return segments<1, 2, 1, 1, kCausal>;
  if (name.find("segments_1_2_1_2_") == 0) return segments<1, 2, 1, 2, kCausal>;
  if (name.find("segments_1_2_4_1_") == 0) return segments<1, 2, 4, 1, kCausal>;
  if (name.find("segments_1_2_4_2_") == 0) return segments<1, 2, 4, 2, kCausal>;
  if (name.find("segments_4_2_1_2_") == 0) return segments<4, 2, 1, 2, kCausal>;
  if (name.find("segments_4_2_4_2_") == 0) return segments<4, 2, 4, 2, kCausal>;
  if (name.find("segments_1_8_1_4_") == 0) return segments<1, 8, 1, 4, kCausal>;
  if (name.find("segments_4_2_4_1_") == 0) return segments<4, 2, 4, 1, kCausal>;
  if (name.find("segments_4_2_1_1_") == 0) return segments<4, 2, 1, 1, kCausal>;
  if (name.find("segments_5_2_5_1_") == 0) return segments<5, 2, 5, 1, kCausal>;
  if (name.find("segments_5_2_1_1_") == 0) return segments<5, 2, 1, 1, kCausal>;
  if (name.find("segments_1_2_5_1_") == 0) return segments<1, 2, 5, 1, kCausal>;
  if (name.find("segments_5_4_5_2_") == 0) return segments<5, 4, 5, 2, kCausal>;
  return nullptr;
}

}  // namespace

bool launch_segments(const Launch& launch, const char*& error) {
  if (launch.kernel.find("segments_") != 0) return false;
  auto kernel = launch.kernel.back() == '1' ? kernel_of<true>(launch.kernel) : kernel_of<false>(launch.kernel);
  if (!kernel) return false;
  error = emulate(kernel, launch.kernel, launch.parameters, launch.blocks, launch.threads, launch.smem);
  return true;
}

}  // namespace minilm::cuda
