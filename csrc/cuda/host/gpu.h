// Access to a GPU: its properties, loading kernels by name, launching them. gpu.cpp implements it with the CUDA driver
// library; tests/relation/backends/cuda/emulated.cpp implements it with a GPU emulated on the host. Functions that can
// fail return null, or an error message.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>

#include "cuda/device/launch_params.h"

namespace minilm::cuda {

// Properties of a GPU.
struct DeviceProps {
  int64_t smem_per_block, smem_per_sm;  // bytes of shared memory
  int capability;                       // 90 for compute capability 9.0
  int processors;                       // SMs
};

struct Launch {
  std::string kernel;
  int64_t blocks;
  int threads;
  int64_t smem;  // bytes of dynamic shared memory
  alignas(16) char parameters[sizeof(LaunchParams)];

  template <class Parameters>
  Launch(std::string name, const Parameters& given, int64_t blocks_, int threads_, int64_t smem_)
      : kernel(std::move(name)), blocks(blocks_), threads(threads_), smem(smem_) {
    static_assert(std::is_trivially_copyable_v<Parameters> && sizeof(Parameters) <= sizeof parameters, "");
    std::memcpy(parameters, &given, sizeof given);
  }
};

const char* get_device_props(int device, DeviceProps& props);

bool is_loaded(int device, const std::string& kernel);

// Loads the kernel `name` from machine code or zero-terminated PTX. Does nothing if the kernel is already loaded.
const char* load(int device, const std::string& name, const void* image);

// Launches a loaded kernel on a stream.
const char* launch(int device, const Launch& launch, void* stream);

}  // namespace minilm::cuda
