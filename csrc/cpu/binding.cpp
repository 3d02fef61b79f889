// Registers the operators of the CPU backend with PyTorch.

#include "common/binding.h"
#include "driver.h"

namespace {

using namespace minilm;

void parallel_run(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

// Returns the struct of a call. `like`: a query of the student, which has the shape of all queries.
Call call_of(const Tensor& like, size_t num_relations, const Tensor& tokens, const Tensor& starts,
             const OptionalTensor& prefixes, const OptionalTensor& query_mask, bool causal,
             const OptionalTensor& weights, const OptionalTensor& row_grads, const OptionalTensor& values,
             const OptionalTensor& rows, bool gradient) {
  Call call{};
  call.packed = like.dim() == 3;
  call.num_relations = static_cast<int64_t>(num_relations);
  call.num_sequences = starts.numel() - 1;
  call.num_heads = like.size(call.packed ? 1 : 2);
  call.positions = call.max_length = like.size(call.packed ? 0 : 1);
  call.tokens = input_data<int64_t>(tokens, ScalarType::Long);
  call.starts = input_data<int64_t>(starts, ScalarType::Long);
  call.prefixes = input_data<int64_t>(prefixes, ScalarType::Long);
  call.query_mask = input_data<bool>(query_mask, ScalarType::Bool);
  call.causal = causal;
  call.weights = input_data<float>(weights, ScalarType::Float);
  call.row_grads = input_data<float>(row_grads, ScalarType::Float);
  call.values = values ? output_data(*values) : nullptr;
  call.row_values = rows ? output_data(*rows) : nullptr;
  call.gradient = gradient;
  return call;
}

void relation_kl(Tensors teacher, Tensors student, std::vector<int64_t> indices, std::vector<double> scales,
                 Tensor tokens, Tensor starts, OptionalTensor prefixes, OptionalTensor query_mask, bool causal,
                 OptionalTensor weights, OptionalTensor row_grads, OptionalTensor values, OptionalTensor rows,
                 Tensors grads, std::string instruction_set) {
  std::vector<Relation> relations = relations_of(teacher, student, indices, scales, grads);
  Call call = call_of(student.at(indices.at(0)), relations.size(), tokens, starts, prefixes, query_mask, causal,
                      weights, row_grads, values, rows, !grads.empty());
  cpu::ThreadPool threads{static_cast<int64_t>(torch::stable::get_num_threads()), parallel_run};
  const char* error = cpu::run(call, relations.data(), threads, instruction_set.c_str());
  STD_TORCH_CHECK(error == nullptr, "backend cpu: ", error);
}

// The names of the supported instruction sets, comma-separated, best first.
std::string instruction_sets() {
  std::string names;
  for (const char* const* name = cpu::instruction_sets(); *name; ++name)
    names += (names.empty() ? "" : ",") + std::string(*name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(minilm_kernels_cpu, m) {
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] indices, float[] scales, Tensor tokens, Tensor starts, "
      "Tensor? prefixes, Tensor? query_mask, bool causal, Tensor? weights, Tensor? row_grads, Tensor(a!)? values, "
      "Tensor(b!)? rows, Tensor(c!)[] grads, str instruction_set) -> ()");
  m.def("instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_cpu, CPU, m) { m.impl("relation_kl", TORCH_BOX(&relation_kl)); }

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
}
