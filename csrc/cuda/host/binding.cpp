// Registers the operators of the CUDA backend with PyTorch. Stream and device are passed as numbers. No symbol of
// PyTorch's CUDA library is therefore needed, and the library also loads without a GPU. Tensors on the CPU are accepted
// as well, for tests that replace the driver library or the GPU.

#include "common/binding.h"
#include "driver.h"

#if !defined(MINILM_LIBRARY)
#define MINILM_LIBRARY minilm_kernels_cuda
#endif

namespace {

using namespace minilm;

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "backend cuda: ", error); }

cuda::DeviceProps device_props(int64_t device) {
  cuda::DeviceProps props{};
  check(cuda::get_device_props(static_cast<int>(device), props));
  return props;
}

// Launches a call's kernels, or returns the names of those that must be loaded first, one per line.
std::string relation_kl(Tensors teacher, Tensors student, std::vector<int64_t> indices, std::vector<double> scales,
                        Tensor tokens, Tensor starts, OptionalTensor prefixes, OptionalTensor query_mask, bool causal,
                        OptionalTensor weights, OptionalTensor row_grads, OptionalTensor values, OptionalTensor rows,
                        Tensors grads, bool padded, int64_t max_length, int64_t stream, int64_t device) {
  const Tensor& like = student.at(indices.at(0));
  std::vector<Relation> relations = relations_of(teacher, student, indices, scales, grads);
  Call call = call_of(like, relations.size(), tokens, starts, prefixes, query_mask, causal, weights, row_grads, values,
                      rows, !grads.empty());
  call.padded = padded;
  if (max_length < call.max_length) call.max_length = max_length;
  const cuda::DeviceProps props = device_props(device);
  const int64_t bytes = cuda::scratch_bytes(call, relations.data(), props);
  check(bytes < 0 ? "the call has more than 2^31 - 1 thread blocks; split the batch" : nullptr);
  Tensor scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  std::string missing;
  check(cuda::run(call, relations.data(), props, static_cast<int>(device), reinterpret_cast<void*>(stream),
                  scratch.mutable_data_ptr(), missing));
  return missing;
}

// Loads a kernel. `image`: machine code or PTX, followed by a zero byte.
void load(std::string name, Tensor image, int64_t device) {
  check(cuda::load(static_cast<int>(device), name, image.const_data_ptr()));
}

// Returns the compute capability of the device, 90 for 9.0.
int64_t capability(int64_t device) { return device_props(device).capability; }

// Returns the reason why the device cannot compute relations of these tensors, or an empty string.
std::string unsupported_reason(Tensors teacher, Tensors student, std::vector<int64_t> indices, int64_t device) {
  return cuda::unsupported_reason(relations_of(teacher, student, indices), true, device_props(device));
}

}  // namespace

STABLE_TORCH_LIBRARY(MINILM_LIBRARY, m) {
  m.def("relation_kl(" MINILM_RELATION_SCHEMA ", bool padded, int max_length, int stream, int device) -> str");
  m.def("load(str name, Tensor image, int device) -> ()");
  m.def("capability(int device) -> int");
  m.def("unsupported_reason(Tensor[] teacher, Tensor[] student, int[] indices, int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(MINILM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
  m.impl("load", TORCH_BOX(&load));
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("unsupported_reason", TORCH_BOX(&unsupported_reason));
}
