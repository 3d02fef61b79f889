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

std::string relation_kl(Tensors, Tensors, std::vector<int64_t>, std::vector<double>, torch::stable::Tensor,
                        torch::stable::Tensor, Optional, Optional, bool, Optional, Optional, Optional, Optional,
                        Tensors, bool, int64_t, int64_t, int64_t) {
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY(minilm_kernels_nothing, m) {
  m.def(
      "relation_kl(Tensor[] teacher, Tensor[] student, int[] indices, float[] scales, Tensor tokens, Tensor starts, "
      "Tensor? prefixes, Tensor? query_mask, bool causal, Tensor? weights, Tensor? row_grads, Tensor(a!)? values, "
      "Tensor(b!)? rows, Tensor(c!)[] grads, bool padded, int max_length, int stream, int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(minilm_kernels_nothing, CompositeExplicitAutograd, m) {
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
}
