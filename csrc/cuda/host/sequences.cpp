#include "sequences.h"

#include <algorithm>

#include "launch_plan.h"

namespace minilm::cuda {

Sequences::Sequences(const Call& call, const Masks& masks) {
  static_cast<Masks&>(params_) = masks;
  params_.packed = call.packed;
  params_.num_sequences = call.num_sequences;
  params_.num_heads = call.num_heads;
  params_.positions = call.positions;
  const bool counts = masks.attention_mask.data || masks.query_mask.data;
  const bool any = call.num_sequences > 0;
  lists_ = any && (counts || (masks.prefix_lens.data && masks.prefix_lens.bytes != 8));
  weighs_ = any && (call.packed || (counts && masks.reduction != Reduction::sum));
}

int64_t Sequences::place(SequenceParams& params, char* scratch) const {
  const int64_t sequences = params.num_sequences;
  const int64_t tokens = params.packed ? params.positions : sequences * params.positions;
  int64_t size = 0;
  auto take = [&](auto*& array, int64_t count) {
    using Item = std::remove_reference_t<decltype(*array)>;
    array = scratch ? reinterpret_cast<Item*>(scratch + size) : nullptr;
    size += round_up(count * static_cast<int64_t>(sizeof(Item)), 256);
  };
  if (lists_ && params.attention_mask.data) {
    take(params.tokens, tokens);
    take(params.lengths, sequences);
  }
  if (lists_ && params.query_mask.data) take(params.counted, tokens);
  if (lists_ && params.prefix_lens.data) take(params.prefixes, sequences);
  if (lists_) take(params.row_counts, sequences);
  if (weighs_ && params.packed) take(params.starts, sequences + 1);
  if (weighs_) take(params.weights, sequences);
  return size;
}

int64_t Sequences::bytes() const {
  SequenceParams params = params_;
  return place(params, nullptr);
}

void Sequences::operator()(Call& call, char* scratch, std::vector<Launch>& launches) const {
  SequenceParams params = params_;
  place(params, scratch);
  const bool counted = params.attention_mask.data || params.query_mask.data;
  if (!counted) params.row_counts = nullptr;
  call.tokens = params.tokens;
  call.starts = params.starts;
  call.lengths = params.lengths;
  call.query_mask = params.counted;
  call.prefixes = params.prefixes ? params.prefixes
                                  : static_cast<const int64_t*>(static_cast<const void*>(params.prefix_lens.data));
  call.weights = params.weights;
  const float heads = static_cast<float>(call.num_heads), length = static_cast<float>(call.positions);
  const float rows = std::max(1.0f, length) * static_cast<float>(std::max<int64_t>(1, call.num_sequences));
  call.weight = params.reduction == Reduction::sum ? 1.0f : 1.0f / (heads * rows);
  // A number per thread and warp, and the sums of warps.
  if (lists_) launches.emplace_back(sequences_kernel(), params, params.num_sequences, 256, kScratchBytes + 1152);
  if (weighs_) launches.emplace_back(weights_kernel(), params, 1, 512, kScratchBytes);
}

}  // namespace minilm::cuda
