// The emulated symmetric kernel.

#include "cuda/device/symmetric.cuh"

#include <cstdio>

#include "kernels.h"

namespace minilm::cuda {
namespace {

template <int kFormat, int kChunksT, int kFormatT, int kChunksS, bool kCausal>
void symmetric(const LaunchParams params) {
  SymmetricKernel<kFormat, kChunksT, kFormatT, kChunksS, kCausal>::run(params, shared_memory());
}

template <bool kCausal>
void (*kernel_of(const std::string& name, int format))(const LaunchParams) {
  if (name.find("symmetric_1_1_1_1_") == 0) return symmetric<1, 1, 1, 1, kCausal>;
  if (name.find("symmetric_1_2_1_2_") == 0) return symmetric<1, 2, 1, 2, kCausal>;
  if (name.find("symmetric_1_2_1_1_") == 0) return symmetric<1, 2, 1, 1, kCausal>;
  if (name.find("symmetric_1_8_1_4_") == 0) return symmetric<1, 8, 1, 4, kCausal>;
  if (name.find("symmetric_4_2_4_1_") == 0) return symmetric<4, 2, 4, 1, kCausal>;
  if (name.find("symmetric_4_8_4_4_") == 0) return symmetric<4, 8, 4, 4, kCausal>;
  if (name.find("symmetric_5_2_5_1_") == 0) return symmetric<5, 2, 5, 1, kCausal>;
  if (name.find("symmetric_5_2_1_1_") == 0) return symmetric<5, 2, 1, 1, kCausal>;
  if (name.find("symmetric_1_2_5_1_") == 0) return symmetric<1, 2, 5, 1, kCausal>;
  if (name.find("symmetric_5_4_5_2_") == 0) return symmetric<5, 4, 5, 2, kCausal>;
  if (name.find("symmetric_4_2_1_1_") == 0) return symmetric<4, 2, 1, 1, kCausal>;
  return format == 1          ? symmetric<1, 0, 0, 0, kCausal>
         : format == kFloat16 ? symmetric<kFloat16, 0, 0, 0, kCausal>
                              : symmetric<kFloat32, 0, 0, 0, kCausal>;
}

}  // namespace

bool launch_symmetric(const Launch& launch, const char*& error) {
  int format, chunks_t, format_t, chunks_s, causal;
  if (std::sscanf(launch.kernel.c_str(), "symmetric_%d_%d_%d_%d_%d", &format, &chunks_t, &format_t, &chunks_s,
                  &causal) != 5)
    return false;
  auto kernel = causal ? kernel_of<true>(launch.kernel, format) : kernel_of<false>(launch.kernel, format);
  error = emulate(kernel, launch.kernel, launch.parameters, launch.blocks, launch.threads, launch.smem);
  return true;
}

}  // namespace minilm::cuda

// Replaces each pair of the `count` numbers u by 2^u.
extern "C" __attribute__((visibility("default"))) void emulated_exp2_polynomial(float* u, int64_t count) {
  using namespace minilm::cuda;
  for (int64_t i = 0; i + 1 < count; i += 2) store(u + i, exp2_polynomial({u[i], u[i + 1]}));
}
