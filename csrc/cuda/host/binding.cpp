// Registers the operators of the CUDA backend with PyTorch. Stream and device are passed as numbers. No symbol of
// PyTorch's CUDA library is therefore needed, and the library also loads without a GPU. Tensors on the CPU are accepted
// as well, for tests that replace the driver library or the GPU.

#include <algorithm>

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

cuda::TokenMask mask_of(const OptionalTensor& x) {
  if (!x) return {};
  const bool per_token = x->dim() == 2;
  return {x->const_data_ptr(), per_token ? x->stride(0) : 0, per_token ? x->stride(1) : x->stride(0),
          static_cast<int32_t>(x->element_size())};
}

cuda::Reduction reduction_of(const std::string& name) {
  return name == "token"      ? cuda::Reduction::token
         : name == "sequence" ? cuda::Reduction::sequence
                              : cuda::Reduction::sum;
}

// Launches a call's kernels, or returns the names of those that must be loaded first, one per line. Masks are of bool
// or integers, prefix_lens of int32 or int64. A call with `row_grads` or `rows` has the reduction "sum".
std::string relation_kl(Tensors teacher, Tensors student, std::vector<int64_t> indices, std::vector<double> scales,
                        OptionalTensor attention_mask, OptionalTensor cu_seqlens, OptionalTensor prefix_lens,
                        OptionalTensor query_mask, int64_t max_seqlen, bool causal, std::string reduction,
                        std::optional<std::vector<double>> weights, OptionalTensor row_grads, OptionalTensor values,
                        OptionalTensor rows, Tensors grads, int64_t stream, int64_t device) {
  const Tensor& like = student.at(indices.at(0));
  std::vector<Relation> relations = relations_of(teacher, student, indices, scales, grads);
  Call call{};
  call.packed = cu_seqlens.has_value();
  call.num_relations = static_cast<int64_t>(relations.size());
  call.num_sequences = call.packed ? cu_seqlens->numel() - 1 : like.size(0);
  call.num_heads = like.size(call.packed ? 1 : 2);
  call.positions = call.max_length = like.size(call.packed ? 0 : 1);
  call.causal = causal;
  call.padded = attention_mask.has_value();
  call.gradient = !grads.empty();
  call.row_grads = input_data<float>(row_grads, ScalarType::Float);
  call.values = values ? output_data(*values) : nullptr;
  call.row_values = rows ? output_data(*rows) : nullptr;
  if (max_seqlen >= 0 && call.num_sequences > 0) {
    // Malformed bounds are replaced by those of sequences of equal lengths.
    const int64_t equal = (call.positions + call.num_sequences - 1) / call.num_sequences;
    call.max_length = std::min(call.max_length, std::max(max_seqlen, equal));
  }
  cuda::Masks masks{};
  masks.attention_mask = mask_of(attention_mask);
  masks.query_mask = mask_of(query_mask);
  masks.prefix_lens = mask_of(prefix_lens);
  masks.prefix_lens.batch_stride = masks.prefix_lens.position_stride;
  masks.cu_seqlens = input_data<int32_t>(cu_seqlens, ScalarType::Int);
  masks.max_seqlen = max_seqlen;
  masks.reduction = reduction_of(reduction);

  const cuda::DeviceProps props = device_props(device);
  const int64_t bytes = cuda::scratch_bytes(call, masks, relations.data(), props);
  check(bytes < 0 ? "the call has more than 2^31 - 1 thread blocks; split the batch" : nullptr);
  Tensor scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  std::string missing;
  check(cuda::run(call, masks, weights ? weights->data() : nullptr, relations.data(), props, static_cast<int>(device),
                  reinterpret_cast<void*>(stream), scratch.mutable_data_ptr(), missing));
  return missing;
}

// Computes outputs[k] = Σ parts[p] · upstream[relations[p]] · weights[p] over the parts with owners[p] == k, which are
// neighbours; likewise. `upstream`: one number per relation, or a scalar.
std::string scale(Tensors parts, std::vector<int64_t> owners, std::vector<int64_t> relations,
                  std::vector<double> weights, Tensor upstream, Tensors outputs, int64_t stream, int64_t device) {
  std::vector<cuda::ScaledOutput> scaled(outputs.size());
  for (size_t k = 0; k < outputs.size(); ++k)
    scaled[k] = {outputs[k].mutable_data_ptr(), outputs[k].numel(), 0, dtype_of(outputs[k]), 0, 0};
  std::vector<cuda::ScaledPart> all;
  for (size_t p = 0; p < parts.size(); ++p) {
    cuda::ScaledOutput& output = scaled.at(owners.at(p));
    STD_TORCH_CHECK(
        parts[p].is_contiguous() && parts[p].scalar_type() == ScalarType::Float && parts[p].numel() == output.numel,
        "expected contiguous float32 gradients in the shape of the outputs");
    if (output.num_parts++ == 0) output.first_part = static_cast<int32_t>(p);
    all.push_back({static_cast<const float*>(parts[p].const_data_ptr()), static_cast<float>(weights.at(p)),
                   static_cast<int32_t>(relations.at(p))});
  }
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float, "expected an upstream gradient in float32");
  std::string missing;
  check(cuda::scale(scaled, all, static_cast<const float*>(upstream.const_data_ptr()),
                    upstream.dim() == 0 ? 0 : upstream.stride(0), static_cast<int>(device),
                    reinterpret_cast<void*>(stream), missing));
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
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] indices, float[] scales, Tensor? attention_mask, "
      "Tensor? cu_seqlens, Tensor? prefix_lens, Tensor? query_mask, int max_seqlen, bool causal, str reduction, "
      "float[]? weights, Tensor? row_grads, Tensor(a!)? values, Tensor(b!)? rows, Tensor(c!)[] grads, int stream, "
      "int device) -> str");
  m.def(
      "scale(Tensor[] parts, int[] owners, int[] relations, float[] weights, Tensor upstream, Tensor(a!)[] outputs, "
      "int stream, int device) -> str");
  m.def("load(str name, Tensor image, int device) -> ()");
  m.def("capability(int device) -> int");
  m.def("unsupported_reason(Tensor[] teacher, Tensor[] student, int[] indices, int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(MINILM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
  m.impl("scale", TORCH_BOX(&scale));
  m.impl("load", TORCH_BOX(&load));
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("unsupported_reason", TORCH_BOX(&unsupported_reason));
}
