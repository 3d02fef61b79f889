// How a call is laid over a device: tokens, warps and shared memory of a block. Plain C++, tested without a GPU.
#pragma once

#include <string>

#include "../device/batch.h"

namespace minilm::cuda {

// A plane is 8 features of one piece of a token.
struct Planes {
  int teacher, student, student_chunks, student_splits;
};
Planes planes_of(const Relation& relation);

// The kernels that a relation needs, compiled for its own shape: names as in device/kernels.cuh.
std::string symmetric_kernel(const Relation& relation, bool causal);
std::string row_stats_kernel(const Relation& relation, bool exact);
std::string row_wise_kernel(const Relation& relation, bool gradient);
inline const char* reduction_kernel() { return "reduce"; }

struct SymmetricPlan {
  int tokens;  // that a block holds; longer sequences go row by row. 0: not one tile fits.
  int warps;
  int blocks;  // on one processor at a time
  int64_t bytes;
};
SymmetricPlan plan_symmetric(const DeviceProps& props, const Planes& planes, int64_t max_length);

struct RowWisePlan {
  int warps;   // each owns a tile; 0: does not fit
  int streamed;  // tokens of the other side in shared memory
  int64_t bytes;
};
RowWisePlan plan_row_wise(const DeviceProps& props, const Planes& planes, bool gradient);

int64_t symmetric_bytes(const Planes& planes, int tokens);
int64_t row_wise_bytes(const Planes& planes, int own, int streamed, bool gradient);

}  // namespace minilm::cuda
