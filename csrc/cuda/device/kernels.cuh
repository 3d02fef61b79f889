// The kernels. Each is compiled by itself, for the shape of one call: `fused_1_2_1_1_0` is MINILM_FUSED with the template
// arguments 1, 2, 1, 1, 0. minilm_kernels/relation/backends/cuda_compiler.py appends that one line and hands the text to NVRTC;
// host/driver.cpp makes the names.
#pragma once

#include "fused.cuh"
#include "rows.cuh"

#define MINILM_SYMMETRIC(name, splits_s, ...)                                                                     \
  extern "C" MINILM_KERNEL(32 * minilm::cuda::kSymmetricWarps[splits_s], 1) name(const MINILM_PARAMETER minilm::cuda::LaunchParams b) { \
    minilm::cuda::SymmetricKernel<splits_s, __VA_ARGS__>::run(b, minilm::cuda::shared_memory());                   \
  }

#define MINILM_ROW_STATS(name, ...)                                                                          \
  extern "C" MINILM_KERNEL(32 * minilm::cuda::kRowWiseWarps, 2) name(const MINILM_PARAMETER minilm::cuda::LaunchParams b) { \
    minilm::cuda::RowStatsKernel<__VA_ARGS__>::run(b, minilm::cuda::shared_memory());                        \
  }

#define MINILM_ROW_WISE(name, ...)                                                                               \
  extern "C" MINILM_KERNEL(32 * minilm::cuda::kRowWiseWarps, 2) name(const MINILM_PARAMETER minilm::cuda::LaunchParams b) { \
    minilm::cuda::RowWiseKernel<__VA_ARGS__>::run(b, minilm::cuda::shared_memory());                             \
  }

#define MINILM_REDUCE(name, ...)                                                                              \
  extern "C" MINILM_KERNEL(256, 1) name(const MINILM_PARAMETER minilm::cuda::ReduceParams r) {                    \
    minilm::cuda::ReductionKernel::run(r, minilm::cuda::shared_memory());                                      \
  }
