// See kernels.h.

#include "device/fused.cuh"

#include <cstdio>

#include "kernels.h"

namespace minilm::cuda {
namespace {

template <int kPieces, int kChunksT, int kPiecesT, int kChunksS, bool kCausal>
void fused(const Batch batch) {
  FusedKernel<kPieces, kChunksT, kPiecesT, kChunksS, kCausal>::run(batch, shared_memory());
}

template <bool kCausal>
void (*kernel_of(const std::string& name, int pieces))(const Batch) {
  if (name.find("fused_1_2_1_1_") == 0) return fused<1, 2, 1, 1, kCausal>;
  if (name.find("fused_1_8_1_4_") == 0) return fused<1, 8, 1, 4, kCausal>;
  return pieces == 1 ? fused<1, 0, 0, 0, kCausal> : pieces == 2 ? fused<2, 0, 0, 0, kCausal> : fused<3, 0, 0, 0, kCausal>;
}

}  // namespace

bool launch_fused(const Launch& launch, const char*& error) {
  int pieces, chunks_t, pieces_t, chunks_s, causal;
  if (std::sscanf(launch.kernel.c_str(), "fused_%d_%d_%d_%d_%d", &pieces, &chunks_t, &pieces_t, &chunks_s, &causal) != 5)
    return false;
  auto kernel = causal ? kernel_of<true>(launch.kernel, pieces) : kernel_of<false>(launch.kernel, pieces);
  error = emulate(kernel, launch.parameters, launch.blocks, launch.threads, launch.shared);
  return true;
}

}  // namespace minilm::cuda
