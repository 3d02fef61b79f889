// The fused kernel for (16, 8) in bfloat16, the mission's everyday case, and for any width and dtype by the student's
// number of pieces.

#include "fused.cuh"
#include "launch.h"

namespace minilm::cuda {
namespace {

template <int kPieces, int kChunksT, int kPiecesT, int kChunksS>
MINILM_KERNEL(32 * kFusedWarps[kPieces], 1) fused(const MINILM_PARAMETER Batch batch) {
  FusedKernel<kPieces, kChunksT, kPiecesT, kChunksS>::run(batch, shared_memory());
}

}  // namespace

const char* launch_fused(const Batch& batch, int pieces, bool everyday, int64_t blocks, int threads, int64_t shared,
                         void* stream) {
  auto kernel = everyday ? fused<1, 2, 1, 1> : pieces == 1 ? fused<1, 0, 0, 0> : pieces == 2 ? fused<2, 0, 0, 0>
                                                                                              : fused<3, 0, 0, 0>;
  return launch(kernel, batch, blocks, threads, shared, stream);
}

}  // namespace minilm::cuda
