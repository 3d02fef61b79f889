// See kernels.h.

#include "device/rows.cuh"

#include <cstdio>

#include "kernels.h"

namespace minilm::cuda {
namespace {

template <bool kExact>
void statistics(const Batch batch) {
  StatisticsKernel<kExact, 0, 0, 0, 0>::run(batch, shared_memory());
}

template <int kPieces>
void visit(const Batch batch) {
  VisitKernel<kPieces, 0, 0, 0, 0>::run(batch, shared_memory());
}

void reduce(const Reduction reduction) { ReductionKernel::run(reduction, shared_memory()); }

}  // namespace

bool launch_rows(const Launch& launch, const char*& error) {
  auto run = [&](auto kernel) {
    error = emulate(kernel, launch.parameters, launch.blocks, launch.threads, launch.shared);
    return true;
  };
  int first;
  if (launch.kernel == "reduce") return run(reduce);
  if (std::sscanf(launch.kernel.c_str(), "statistics_%d_", &first) == 1)
    return run(first ? statistics<true> : statistics<false>);
  if (std::sscanf(launch.kernel.c_str(), "visit_%d_", &first) == 1)
    return run(first == 0 ? visit<0> : first == 1 ? visit<1> : first == 2 ? visit<2> : visit<3>);
  return false;
}

}  // namespace minilm::cuda
