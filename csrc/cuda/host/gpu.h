// What the host code needs of a GPU: its limits, kernels by name, launches. gpu.cpp asks the CUDA driver library; the
// tests have a GPU emulated on the host (tests/relation/backends/cuda/emulated.cpp). Each function that can fail returns null, or
// what went wrong.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>

#include "../device/batch.h"

namespace minilm::cuda {

struct Launch {
  std::string kernel;
  int64_t blocks;
  int threads;
  int64_t shared;  // bytes
  alignas(16) char parameters[sizeof(LaunchParams)];

  template <class Parameters>
  Launch(std::string name, const Parameters& given, int64_t blocks_, int threads_, int64_t shared_)
      : kernel(std::move(name)), blocks(blocks_), threads(threads_), shared(shared_) {
    static_assert(std::is_trivially_copyable_v<Parameters> && sizeof(Parameters) <= sizeof parameters, "");
    std::memcpy(parameters, &given, sizeof given);
  }
};

const char* find_device(int device, DeviceProps& props, int& capability);

bool is_loaded(int device, const std::string& kernel);

// Loads the kernel `name` from machine code or PTX, which ends with a zero; one that is loaded already stays.
const char* load(int device, const std::string& name, const void* image);

// Queues a loaded kernel.
const char* launch(int device, const Launch& launch, void* stream);

}  // namespace minilm::cuda
