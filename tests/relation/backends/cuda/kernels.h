// The emulated library's kernels. Those of other shapes than the two that are compiled as on a GPU read chunks and pieces
// from the call: compiling each shape of the tests would take minutes.
#pragma once

#include "host/gpu.h"

namespace minilm::cuda {

// False: the kernel is not one of these.
bool launch_fused(const Launch& launch, const char*& error);
bool launch_rows(const Launch& launch, const char*& error);

}  // namespace minilm::cuda
