// The emulated row-wise kernels and the reduction.

#include "cuda/device/row_wise.cuh"

#include <cstdio>

#include "kernels.h"

namespace minilm::cuda {
namespace {

template <bool kExact>
void row_stats(const LaunchParams params) {
  RowStatsKernel<kExact, 0, 0, 0, 0>::run(params, shared_memory());
}

template <int kSplits>
void row_wise(const LaunchParams params) {
  RowWiseKernel<kSplits, 0, 0, 0, 0>::run(params, shared_memory());
}

void reduce(const ReduceParams reduction) { ReduceKernel::run(reduction, shared_memory()); }

}  // namespace

bool launch_row_wise(const Launch& launch, const char*& error) {
  auto run = [&](auto kernel) {
    error = emulate(kernel, launch.kernel, launch.parameters, launch.blocks, launch.threads, launch.smem);
    return true;
  };
  int first;
  if (launch.kernel == "reduce") return run(reduce);
  if (std::sscanf(launch.kernel.c_str(), "row_stats_%d_", &first) == 1)
    return run(first ? row_stats<true> : row_stats<false>);
  if (std::sscanf(launch.kernel.c_str(), "row_wise_%d_", &first) == 1)
    return run(first == 0 ? row_wise<0> : first == 1 ? row_wise<1> : first == 2 ? row_wise<2> : row_wise<3>);
  return false;
}

}  // namespace minilm::cuda
