// Between the driver (relation.cpp) and the kernels (*.cu): each returns null, or what went wrong.
#pragma once

#include "batch.h"

namespace minilm::cuda {

// `pieces` of the student's tokens, 1 to 3; `everyday`: all relations are bfloat16 of chunks (2, 1), widths to (16, 8).
const char* launch_fused(const Batch& batch, int pieces, bool everyday, int64_t blocks, int threads, int64_t shared,
                         void* stream);
const char* launch_statistics(const Batch& batch, bool exact, int64_t blocks, int threads, int64_t shared,
                              void* stream);
// `pieces` of the student's tokens, 1 to 3; 0: no gradient is wanted.
const char* launch_visit(const Batch& batch, int pieces, int64_t blocks, int threads, int64_t shared, void* stream);
const char* launch_reduction(const Reduction& reduction, void* stream);

const char* find_device(int device, Limits& limits, int& capability);

}  // namespace minilm::cuda
