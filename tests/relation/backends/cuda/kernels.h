// Kernels of the emulated library. Two shapes are compiled like on a GPU. The others read the numbers of chunks and
// splits from the call, since compiling every shape of the tests would take minutes.
#pragma once

#include "cuda/host/gpu.h"

namespace minilm::cuda {

// Return false for other kernels.
bool launch_symmetric(const Launch& launch, const char*& error);
bool launch_row_wise(const Launch& launch, const char*& error);

}  // namespace minilm::cuda
