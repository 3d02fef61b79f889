// Entry points of the kernels. minilm_kernels/relation/backends/cuda_compiler.py inlines the includes, appends one of
// the macros below for each kernel that a call needs, and compiles the text with NVRTC. `symmetric_1_2_1_1_0` is
// MINILM_SYMMETRIC with the template arguments 1, 2, 1, 1, 0; host/launch_plan.cpp makes these names.
#pragma once

#include "segments.cuh"

#define MINILM_ENTRY(threads, blocks, name, Params, ...)                                               \
  extern "C" MINILM_KERNEL(threads, blocks) name(const MINILM_PARAMETER minilm::cuda::Params params) { \
    minilm::cuda::__VA_ARGS__::run(params, minilm::cuda::shared_memory());                             \
  }

#define MINILM_SYMMETRIC(name, ...)                                                                       \
  MINILM_ENTRY((32 * minilm::cuda::SymmetricKernel<__VA_ARGS__>::kSchedule.warps), 1, name, LaunchParams, \
               SymmetricKernel<__VA_ARGS__>)
#define MINILM_SEGMENTS(name, ...)                                                             \
  MINILM_ENTRY((32 * minilm::cuda::SegmentKernel<__VA_ARGS__>::kWarps), 2, name, LaunchParams, \
               SegmentKernel<__VA_ARGS__>)
#define MINILM_ROW_STATS(name, ...) \
  MINILM_ENTRY(32 * minilm::cuda::kRowWiseWarps, 2, name, LaunchParams, RowStatsKernel<__VA_ARGS__>)
#define MINILM_ROW_WISE(name, ...) \
  MINILM_ENTRY(32 * minilm::cuda::kRowWiseWarps, 2, name, LaunchParams, RowWiseKernel<__VA_ARGS__>)
#define MINILM_REDUCE(name) MINILM_ENTRY(256, 1, name, ReduceParams, ReduceKernel)
