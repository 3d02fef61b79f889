// Implements gpu.h with the CUDA driver library, which is opened at run time, so that this package's library also loads
// on machines without a GPU. This file repeats the declarations that it needs and thus compiles without CUDA.

#include "gpu.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <shared_mutex>

namespace minilm::cuda {
namespace {

// --- declarations of cuda.h ---
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
// CUdevice_attribute
constexpr int kProcessors = 16, kSharedPerSm = 81, kBlockSharedOptin = 97, kMajor = 75, kMinor = 76;
constexpr int kStaticShared = 1, kDynamicShared = 8, kCarveout = 9;  // CUfunction_attribute
constexpr int kRelaxed = 2;                                          // CUstreamCaptureMode

struct Library {
  CUresult (*init)(unsigned) = nullptr;
  CUresult (*error_string)(CUresult, const char**) = nullptr;
  CUresult (*device_get)(CUdevice*, int) = nullptr;
  CUresult (*device_attribute)(int*, int, CUdevice) = nullptr;
  CUresult (*retain_context)(CUcontext*, CUdevice) = nullptr;
  CUresult (*current_context)(CUcontext*) = nullptr;
  CUresult (*push_context)(CUcontext) = nullptr;
  CUresult (*pop_context)(CUcontext*) = nullptr;
  CUresult (*capture_mode)(int*) = nullptr;
  CUresult (*module_load)(CUmodule*, const void*) = nullptr;
  CUresult (*module_function)(CUfunction*, CUmodule, const char*) = nullptr;
  CUresult (*get_attribute)(int*, int, CUfunction) = nullptr;
  CUresult (*set_attribute)(CUfunction, int, int) = nullptr;
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
                     void**) = nullptr;
  std::string missing;  // reason why the library cannot be used, or empty

  std::string text_of(CUresult result) const {
    const char* text = nullptr;
    return error_string(result, &text) == 0 && text ? text : "error " + std::to_string(result);
  }

  Library() {
    void* opened = dlopen("libcuda.so.1", RTLD_NOW);
    if (!opened) {
      missing = std::string("the driver library does not open: ") + dlerror();
      return;
    }
    auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(opened, name));
      if (!function) missing = std::string("the driver library has no ") + name;
    };
    find(init, "cuInit");
    find(error_string, "cuGetErrorString");
    find(device_get, "cuDeviceGet");
    find(device_attribute, "cuDeviceGetAttribute");
    find(retain_context, "cuDevicePrimaryCtxRetain");
    find(current_context, "cuCtxGetCurrent");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(capture_mode, "cuThreadExchangeStreamCaptureMode");
    find(module_load, "cuModuleLoadData");
    find(module_function, "cuModuleGetFunction");
    find(get_attribute, "cuFuncGetAttribute");
    find(set_attribute, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernel");
    if (missing.empty())
      if (CUresult r = init(0)) missing = "cuInit: " + text_of(r);
  }
};

const Library& library() {
  static const Library opened;
  return opened;
}

// The message stays valid until the thread's next failure.
const char* failure(const std::string& text) {
  thread_local std::string message;
  message = text;
  return message.c_str();
}

const char* failure(const char* call, CUresult result) {
  return failure(std::string(call) + ": " + library().text_of(result));
}

struct Device {
  CUcontext context = nullptr;
  DeviceProps props{};
  std::map<std::string, CUfunction> kernels;
};

std::shared_mutex mutex;  // guards `devices` and the kernels of every device
std::map<int, Device> devices;

const char* fill(Device& device, int index) {
  const Library& cuda = library();
  if (!cuda.missing.empty()) return failure(cuda.missing);
  CUdevice handle = 0;
  if (CUresult r = cuda.device_get(&handle, index)) return failure("cuDeviceGet", r);
  int block = 0, sm = 0, major = 0, minor = 0, processors = 0;
  const std::pair<int, int*> wanted[] = {
      {kBlockSharedOptin, &block}, {kSharedPerSm, &sm}, {kMajor, &major}, {kMinor, &minor}, {kProcessors, &processors}};
  for (auto [attribute, value] : wanted)
    if (CUresult r = cuda.device_attribute(value, attribute, handle)) return failure("cuDeviceGetAttribute", r);
  if (CUresult r = cuda.retain_context(&device.context, handle)) return failure("cuDevicePrimaryCtxRetain", r);
  device.props = {block, sm, 10 * major + minor, processors};
  return nullptr;
}

const char* find(int index, Device*& device) {
  {
    std::shared_lock lock(mutex);
    auto found = devices.find(index);
    if (found != devices.end()) {
      device = &found->second;
      return nullptr;
    }
  }
  Device made;
  if (const char* error = fill(made, index)) return error;
  std::unique_lock lock(mutex);
  device = &devices.try_emplace(index, std::move(made)).first->second;
  return nullptr;
}

// Makes a device's context current. The tensors may be on another device than the thread's current one.
class Current {
public:
  explicit Current(const Device& device) {
    CUcontext current = nullptr;
    if (CUresult r = library().current_context(&current)) {
      error = failure("cuCtxGetCurrent", r);
    } else if (current != device.context) {
      if (CUresult pushed = library().push_context(device.context))
        error = failure("cuCtxPushCurrent", pushed);
      else
        pushed_ = true;
    }
  }
  ~Current() {
    CUcontext popped;
    if (pushed_) library().pop_context(&popped);
  }
  const char* error = nullptr;

private:
  bool pushed_ = false;
};

}  // namespace

const char* get_device_props(int index, DeviceProps& props) {
  Device* device = nullptr;
  if (const char* error = find(index, device)) return error;
  props = device->props;
  return nullptr;
}

bool is_loaded(int index, const std::string& kernel) {
  std::shared_lock lock(mutex);
  auto device = devices.find(index);
  return device != devices.end() && device->second.kernels.count(kernel) != 0;
}

const char* load(int index, const std::string& name, const void* image) {
  Device* device = nullptr;
  if (const char* error = find(index, device)) return error;
  if (is_loaded(index, name)) return nullptr;
  const Library& cuda = library();
  Current current(*device);
  if (current.error) return current.error;
  int mode = kRelaxed;  // loading allocates memory, which a graph capture permits in this mode only
  if (CUresult r = cuda.capture_mode(&mode)) return failure("cuThreadExchangeStreamCaptureMode", r);
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  int fixed = 0;
  const char* failed = nullptr;
  CUresult result = 0;
  auto step = [&](const char* call, CUresult r) {
    failed = call;
    return (result = r) == 0;
  };
  // The limit of dynamic shared memory is set once, for the largest block, and not per launch: other threads may launch
  // the same kernel with another size.
  step("cuModuleLoadData", cuda.module_load(&module, image)) &&
      step("cuModuleGetFunction", cuda.module_function(&function, module, name.c_str())) &&
      step("cuFuncGetAttribute", cuda.get_attribute(&fixed, kStaticShared, function)) &&
      step("cuFuncSetAttribute",
           cuda.set_attribute(function, kDynamicShared, static_cast<int>(device->props.smem_per_block) - fixed)) &&
      step("cuFuncSetAttribute", cuda.set_attribute(function, kCarveout, 100));
  cuda.capture_mode(&mode);
  if (result) return failure((name + ": " + failed).c_str(), result);
  std::unique_lock lock(mutex);
  device->kernels.try_emplace(name, function);
  return nullptr;
}

const char* launch(int index, const Launch& launch, void* stream) {
  CUfunction function = nullptr;
  const Device* device = nullptr;
  {
    std::shared_lock lock(mutex);
    device = &devices.at(index);
    function = device->kernels.at(launch.kernel);
  }
  Current current(*device);
  if (current.error) return current.error;
  void* parameters[] = {const_cast<char*>(launch.parameters)};
  CUresult r =
      library().launch(function, static_cast<unsigned>(launch.blocks), 1, 1, static_cast<unsigned>(launch.threads), 1,
                       1, static_cast<unsigned>(launch.smem), static_cast<CUstream>(stream), parameters, nullptr);
  return r == 0 ? nullptr : failure((launch.kernel + ": cuLaunchKernel").c_str(), r);
}

}  // namespace minilm::cuda
