// Launch configurations: tokens, warps and shared memory of a block, and kernel names. Plain C++, tested without a GPU.
#pragma once

#include <string>

#include "cuda/device/launch_params.h"
#include "gpu.h"

namespace minilm::cuda {

// Numbers of planes in shared memory. A plane holds one chunk (8 features) of one bf16 split of every token.
struct Planes {
  int teacher, student, student_chunks, student_splits;
  SymmetricSchedule schedule;
};
Planes row_wise_planes_of(const Relation& relation, bool gradient);
Planes symmetric_planes_of(const Relation& relation, const DeviceProps& props);  // self relations

// Names of the kernels that a relation needs. The name contains the template arguments; see device/kernels.cuh.
std::string symmetric_kernel(const Relation& relation, bool causal);
std::string segment_kernel(const Relation& relation, bool causal);
std::string row_stats_kernel(const Relation& relation, bool gradient);
std::string row_wise_kernel(const Relation& relation, bool gradient);
inline const char* reduction_kernel() { return "reduce"; }
inline const char* sequences_kernel() { return "sequences"; }
inline const char* weights_kernel() { return "weights"; }
inline const char* scale_kernel() { return "scale"; }

struct SymmetricPlan {
  int tokens;  // capacity of a block; longer sequences take the row-wise path. 0 if not even one tile fits
  int warps;
  int blocks;  // resident blocks per SM
  int64_t bytes;
};
SymmetricPlan plan_symmetric(const DeviceProps& props, const Planes& planes, int64_t max_length);

struct SegmentPlan {
  int warps;   // each warp owns a strip of a window; 0 if a block does not fit, or the kernel has no strips
  int window;  // tokens
  int blocks;  // resident blocks per SM
  int64_t bytes;
};
SegmentPlan plan_segments(const DeviceProps& props, const Planes& planes);

// Parts of a head of at most `windows` windows, in a launch for `heads` such heads.
int plan_parts(const DeviceProps& props, int64_t heads, int64_t windows);

struct RowWisePlan {
  int warps;     // each warp owns a tile; 0 if a block does not fit
  int streamed;  // other tokens in shared memory
  int64_t bytes;
};
RowWisePlan plan_row_wise(const DeviceProps& props, const Planes& planes, bool gradient);

int64_t symmetric_bytes(const Planes& planes, int tokens);
int64_t segment_bytes(const Planes& planes, int window);
int64_t row_wise_bytes(const Planes& planes, int own, int streamed, bool gradient);

}  // namespace minilm::cuda
