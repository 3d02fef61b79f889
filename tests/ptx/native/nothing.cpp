// An operator that takes the arguments of the CUDA backend's operator and does nothing. It measures PyTorch's own time
// for a call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace {

using Tensors = std::vector<torch::stable::Tensor>;
using Optional = std::optional<torch::stable::Tensor>;

std::string relation_kl(Tensors, Tensors, std::vector<int64_t>, std::vector<double>, Optional, Optional, Optional,
                        Optional, int64_t, bool, std::string, std::optional<std::vector<double>>, Optional, Optional,
                        Optional, Tensors, int64_t, int64_t) {
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY(minilm_kernels_nothing, m) {
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] indices, float[] scales, Tensor? attention_mask, "
      "Tensor? cu_seqlens, Tensor? prefix_lens, Tensor? query_mask, int max_seqlen, bool causal, str reduction, "
      "float[]? weights, Tensor? row_grads, Tensor(a!)? values, Tensor(b!)? rows, Tensor(c!)[] grads, int stream, "
      "int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_nothing, CompositeExplicitAutograd, m) {
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
}
