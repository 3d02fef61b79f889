// Kernels of the emulated library. Two shapes are compiled as on a GPU. For all other shapes, the kernels read the
// numbers of chunks and splits from the call, since compiling every shape of the tests would take minutes.
#pragma once

#include "cuda/host/gpu.h"

namespace minilm::cuda {

// Each function returns false if it does not have the kernel.
bool launch_symmetric(const Launch& launch, const char*& error);
bool launch_segments(const Launch& launch, const char*& error);
bool launch_row_wise(const Launch& launch, const char*& error);

}  // namespace minilm::cuda
