// What PyTorch sees of the CPU backend: one private operator, through the stable ABI (any torch from 2.10 on).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "relation.h"

namespace {

using minilm::cpu::Call;
using minilm::cpu::Matrix;
using minilm::cpu::Relation;
using minilm::cpu::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Matrix matrix_of(const Tensor& x) {
  bool packed = x.dim() == 3;
  Matrix m;
  m.data = x.const_data_ptr();
  m.batch = packed ? 0 : x.stride(0);
  m.position = x.stride(packed ? 0 : 1);
  m.head = x.stride(packed ? 1 : 2);
  m.feature = x.stride(packed ? 2 : 3);
  m.width = x.size(packed ? 2 : 3);
  switch (x.scalar_type()) {
    case ScalarType::Float: m.type = Type::float32; break;
    case ScalarType::Half: m.type = Type::float16; break;
    case ScalarType::BFloat16: m.type = Type::bfloat16; break;
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

void run_on_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

// See minilm_kernels/relation/backends/native_cpu.py for the arguments.
void relation_kl(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<int64_t> pairs,
                 std::vector<double> scales, Tensor tokens, Tensor starts, std::optional<Tensor> prefixes, bool causal,
                 std::optional<Tensor> weights, std::optional<Tensor> row_grads, std::optional<Tensor> values,
                 std::optional<Tensor> rows, std::vector<Tensor> grads, std::string instruction_set) {
  const Tensor& shape = student[0];
  bool packed = shape.dim() == 3;
  std::vector<Relation> relations(pairs.size() / 2);
  size_t slot = 0;
  for (size_t r = 0; r < relations.size(); ++r) {
    int64_t query = pairs[2 * r], key = pairs[2 * r + 1];
    Relation& relation = relations[r];
    relation.teacher = {matrix_of(teacher[query]), matrix_of(teacher[key]), static_cast<float>(scales[2 * r])};
    relation.student = {matrix_of(student[query]), matrix_of(student[key]), static_cast<float>(scales[2 * r + 1])};
    relation.self = query == key;
    relation.query_grad = grads.empty() ? nullptr : output_of(grads.at(slot++));
    relation.key_grad = grads.empty() || relation.self ? relation.query_grad : output_of(grads.at(slot++));
  }
  Call call;
  call.relations = relations.data();
  call.num_relations = static_cast<int64_t>(relations.size());
  call.num_sequences = starts.numel() - 1;
  call.num_heads = shape.size(packed ? 1 : 2);
  call.positions = shape.size(packed ? 0 : 1);
  call.packed = packed;
  call.tokens = data_of<int64_t>(tokens, ScalarType::Long);
  call.starts = data_of<int64_t>(starts, ScalarType::Long);
  call.prefixes = data_of<int64_t>(prefixes, ScalarType::Long);
  call.causal = causal;
  call.weights = data_of<float>(weights, ScalarType::Float);
  call.row_grads = data_of<float>(row_grads, ScalarType::Float);
  call.values = values ? output_of(*values) : nullptr;
  call.rows = rows ? output_of(*rows) : nullptr;
  minilm::cpu::Threads threads{static_cast<int64_t>(torch::stable::get_num_threads()), run_on_threads};
  const char* error = minilm::cpu::run(call, threads, instruction_set.c_str());
  STD_TORCH_CHECK(error == nullptr, "backend cpu: ", error);
}

// Comma-separated, best first.
std::string instruction_sets() {
  std::string names;
  for (const char* const* name = minilm::cpu::instruction_sets(); *name; ++name)
    names += (names.empty() ? "" : ",") + std::string(*name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(minilm_kernels_cpu, m) {
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] pairs, float[] scales, Tensor tokens, Tensor starts, "
      "Tensor? prefixes, bool causal, Tensor? weights, Tensor? row_grads, Tensor(a!)? values, Tensor(b!)? rows, "
      "Tensor(c!)[] grads, str instruction_set) -> ()");
  m.def("instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_cpu, CPU, m) { m.impl("relation_kl", TORCH_BOX(&relation_kl)); }

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
}
