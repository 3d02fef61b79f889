// What PyTorch sees of the CUDA backend: private operators, through the stable ABI (any torch from 2.10 on). No symbol of
// torch's CUDA library is needed: stream and device come in as numbers, and without a GPU the library loads all the same.
// Tensors on the CPU are served too, as a stand-in for the driver library takes them in tests.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "driver.h"
#include "gpu.h"

#if defined(MINILM_EMULATED)
#define MINILM_LIBRARY minilm_kernels_cuda_emulated
#else
#define MINILM_LIBRARY minilm_kernels_cuda
#endif

namespace {

using minilm::cuda::Call;
using minilm::cuda::DeviceProps;
using minilm::cuda::TensorView;
using minilm::cuda::Relation;
using minilm::cuda::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

TensorView view_of(const Tensor& x) {
  bool packed = x.dim() == 3;
  TensorView m;
  m.data = x.const_data_ptr();
  m.params = packed ? 0 : x.stride(0);
  m.position = x.stride(packed ? 0 : 1);
  m.head = x.stride(packed ? 1 : 2);
  m.feature = x.stride(packed ? 2 : 3);
  m.width = static_cast<int32_t>(x.size(packed ? 2 : 3));
  switch (x.scalar_type()) {
    case ScalarType::Float: m.type = DType::float32; break;
    case ScalarType::ModelOperands: m.type = DType::float16; break;
    case ScalarType::BFloat16: m.type = DType::bfloat16; break;
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
  return m;
}

template <class T>
const T* data_of(const std::optional<Tensor>& x, ScalarType type) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous(), "expected another dtype, or contiguous memory");
  return static_cast<const T*>(x->const_data_ptr());
}

float* output_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "expected contiguous float32 memory");
  return static_cast<float*>(x.mutable_data_ptr());
}

std::vector<Relation> relations_of(const std::vector<Tensor>& teacher, const std::vector<Tensor>& student,
                                   const std::vector<int64_t>& tile) {
  std::vector<Relation> relations(tile.size() / 2);
  for (size_t r = 0; r < relations.size(); ++r) {
    int64_t query = tile[2 * r], key = tile[2 * r + 1];
    relations[r] = {};
    relations[r].teacher = {view_of(teacher.at(query)), view_of(teacher.at(key)), 1.0f};
    relations[r].student = {view_of(student.at(query)), view_of(student.at(key)), 1.0f};
    relations[r].self = query == key;
    relations[r].index = static_cast<int32_t>(r);
  }
  return relations;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "backend cuda: ", error); }

DeviceProps limits_of(int64_t device, int& capability) {
  DeviceProps props{};
  check(minilm::cuda::find_device(static_cast<int>(device), props, capability));
  return props;
}

// See minilm_kernels/relation/backends/native_cuda.py for the arguments. Returns the kernels that have to be loaded first, one a
// line; then nothing was queued.
std::string relation_kl(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<int64_t> tile,
                 std::vector<double> scales, Tensor tokens, Tensor starts, std::optional<Tensor> prefixes, bool causal,
                 bool padded, int64_t max_length, std::optional<Tensor> weights, std::optional<Tensor> row_grads,
                 std::optional<Tensor> values, std::optional<Tensor> rows, std::vector<Tensor> grads, int64_t stream,
                 int64_t device) {
  const Tensor& shape = student.at(0);
  bool packed = shape.dim() == 3;
  std::vector<Relation> relations = relations_of(teacher, student, tile);
  size_t slot = 0;
  for (size_t r = 0; r < relations.size(); ++r) {
    Relation& relation = relations[r];
    relation.teacher.scale = static_cast<float>(scales.at(2 * r));
    relation.student.scale = static_cast<float>(scales.at(2 * r + 1));
    relation.query_grad = grads.empty() ? nullptr : output_of(grads.at(slot++));
    relation.key_grad = grads.empty() || relation.self ? relation.query_grad : output_of(grads.at(slot++));
  }
  Call call{};
  call.relations = relations.data();
  call.stream = reinterpret_cast<void*>(stream);
  call.call.num_relations = static_cast<int64_t>(relations.size());
  call.call.num_sequences = starts.numel() - 1;
  call.call.num_heads = shape.size(packed ? 1 : 2);
  call.call.positions = shape.size(packed ? 0 : 1);
  call.call.max_length = max_length < call.call.positions ? max_length : call.call.positions;
  call.call.packed = packed;
  call.call.tokens = data_of<int64_t>(tokens, ScalarType::Long);
  call.call.starts = data_of<int64_t>(starts, ScalarType::Long);
  call.call.prefixes = data_of<int64_t>(prefixes, ScalarType::Long);
  call.call.causal = causal;
  call.call.padded = padded;
  call.call.gradient = !grads.empty();
  call.call.weights = data_of<float>(weights, ScalarType::Float);
  call.call.row_grads = data_of<float>(row_grads, ScalarType::Float);
  call.call.values = values ? output_of(*values) : nullptr;
  call.call.rows = rows ? output_of(*rows) : nullptr;

  int capability = 0;
  DeviceProps props = limits_of(device, capability);
  int64_t bytes = minilm::cuda::scratch_bytes(call, props);
  check(bytes < 0 ? "the call has more than 2^31 - 1 thread blocks; split the params" : nullptr);
  Tensor scratch = torch::stable::new_empty(shape, {bytes}, ScalarType::Byte);
  std::string missing;
  check(minilm::cuda::run(call, props, static_cast<int>(device), scratch.mutable_data_ptr(), missing));
  return missing;
}

// Loads a kernel, machine code or PTX, of which `image` has the bytes and a zero behind them.
void load(std::string name, Tensor image, int64_t device) {
  check(minilm::cuda::load(static_cast<int>(device), name, image.const_data_ptr()));
}

// The device's compute capability, 90 for 9.0.
int64_t capability(int64_t device) {
  int found = 0;
  limits_of(device, found);
  return found;
}

// Why the device cannot serve these tensors; empty: it can.
std::string unsupported_reason(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<int64_t> tile,
                    int64_t device) {
  int capability = 0;
  DeviceProps props = limits_of(device, capability);
  std::vector<Relation> relations = relations_of(teacher, student, tile);
  return minilm::cuda::unsupported_reason(relations.data(), static_cast<int64_t>(relations.size()), true, props, capability);
}

}  // namespace

STABLE_TORCH_LIBRARY(MINILM_LIBRARY, m) {
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] tile, float[] scales, Tensor tokens, Tensor starts, "
      "Tensor? prefixes, bool causal, bool padded, int max_length, Tensor? weights, Tensor? row_grads, "
      "Tensor(a!)? values, Tensor(b!)? rows, Tensor(c!)[] grads, int stream, int device) -> str");
  m.def("load(str name, Tensor image, int device) -> ()");
  m.def("capability(int device) -> int");
  m.def("unsupported_reason(Tensor[] teacher, Tensor[] student, int[] tile, int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(MINILM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
  m.impl("load", TORCH_BOX(&load));
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("unsupported_reason", TORCH_BOX(&unsupported_reason));
}
