// The kernels that go row by row, by the number of pieces of the student's tokens, and the sum of all blocks' values.

#include "rows.cuh"
#include "launch.h"

namespace minilm::cuda {
namespace {

template <bool kExact>
MINILM_KERNEL(32 * kRowsWarps, 2) statistics(const MINILM_PARAMETER Batch batch) {
  StatisticsKernel<kExact>::run(batch, shared_memory());
}

template <int kPieces>
MINILM_KERNEL(32 * kRowsWarps, 2) visit(const MINILM_PARAMETER Batch batch) {
  VisitKernel<kPieces>::run(batch, shared_memory());
}

MINILM_KERNEL(256, 1) reduce(const MINILM_PARAMETER Reduction reduction) {
  ReductionKernel::run(reduction, shared_memory());
}

}  // namespace

const char* launch_statistics(const Batch& batch, bool exact, int64_t blocks, int threads, int64_t shared,
                              void* stream) {
  auto kernel = exact ? statistics<true> : statistics<false>;
  return launch(kernel, batch, blocks, threads, shared, stream);
}

const char* launch_visit(const Batch& batch, int pieces, int64_t blocks, int threads, int64_t shared, void* stream) {
  auto kernel = pieces == 0 ? visit<0> : pieces == 1 ? visit<1> : pieces == 2 ? visit<2> : visit<3>;
  return launch(kernel, batch, blocks, threads, shared, stream);
}

const char* launch_reduction(const Reduction& reduction, void* stream) {
  return launch(reduce, reduction, reduction.num_relations, 256, 256, stream);
}

const char* find_device(int device, Limits& limits, int& capability) {
  return find_limits(device, limits.shared_per_block, limits.shared_per_processor, capability);
}

}  // namespace minilm::cuda
