// Driver of the CUDA backend: groups a call's relations into launches and assigns their memory. It never waits for the
// device or reads from it, so that a call can be captured in a CUDA graph.

#include "driver.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "launch_plan.h"
#include "sequences.h"

namespace minilm::cuda {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // grid limit of a launch

// The largest number of planes of each kind over several relations.
template <class PlanesOf, class Option>
Planes max_planes(const std::vector<const Relation*>& relations, PlanesOf* planes_of, const Option& option) {
  Planes all{};
  for (const Relation* relation : relations) {
    const Planes one = planes_of(*relation, option);
    all = {
        std::max(all.teacher, one.teacher),
        std::max(all.student, one.student),
        std::max(all.student_chunks, one.student_chunks),
        std::max(all.student_splits, one.student_splits),
        {std::max(all.schedule.strip_rows, one.schedule.strip_rows), std::max(all.schedule.warps, one.schedule.warps)}};
  }
  return all;
}

// The launches of up to kMaxRelations relations of a call.
class Run {
public:
  Run(const Call& call, const Relation* relations, int64_t count, const DeviceProps& props)
      : call_(call), props_(props) {
    total_ = call.packed ? call.positions : call.num_sequences * call.positions;
    for (int64_t r = 0; r < count; ++r) {
      const Relation& relation = relations[r];
      all_.push_back(&relation);
      if (may_be_symmetric(relation)) symmetric_.push_back(&relation);
    }
    if (!symmetric_.empty())
      max_symmetric_length_ = std::min<int64_t>(
          call.max_length,
          plan_symmetric(props, max_planes(symmetric_, symmetric_planes_of, props), call.max_length).tokens);
    const bool equal_lengths = !call.packed && !call.padded;
    if (max_symmetric_length_ == 0 || (equal_lengths && max_symmetric_length_ < call.max_length)) {
      symmetric_.clear();
      max_symmetric_length_ = 0;
    }
    if (max_symmetric_length_ < call.max_length) plan_longer();
    for (const Relation* relation : all_)
      if (!is_symmetric(relation) || max_symmetric_length_ < call.max_length) row_wise_.push_back(relation);
    row_wise_plan_ = plan_row_wise(props, max_planes(row_wise_, row_wise_planes_of, call.gradient), call.gradient);
    row_blocks_ = row_wise_.empty() ? 0 : total_ / own() + call.num_sequences;
    segment_slots_ = segmented_.empty() ? 0 : heads() * parts_;
    symmetric_slots_ = symmetric_.empty() ? 0 : heads();
    slots_ = segment_slots_ + symmetric_slots_ + row_blocks_ * call.num_heads;
  }

  int64_t scratch_bytes() const {
    return partials_bytes() + row_stats_bytes() + ranges_bytes() + segment_sums_bytes() + segment_grads_bytes();
  }
  bool too_large() const { return static_cast<int64_t>(all_.size()) * slots_ > kMaxBlocks; }  // each block has a slot

  // Returns the launches in order. `scratch`: device memory of scratch_bytes() bytes.
  // `weights`: factors of the relations in their sum, or null.
  std::vector<Launch> operator()(char* scratch, const double* weights) const {
    const Call& call = call_;
    double* partials = reinterpret_cast<double*>(scratch);
    std::vector<Launch> launches;

    LaunchParams params{};
    params.call = call;
    params.partials = partials - all_[0]->index * slots_;  // relations are indexed within the call
    params.slots = slots_;
    params.row_stats_stride = rows();
    const int64_t first_row = all_[0]->index * call.num_heads * total_;
    char* next = scratch + partials_bytes();
    auto take = [&](auto*& pointer, int64_t bytes, int64_t first) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(next) - first;
      next += bytes;
    };
    take(params.row_stats, row_stats_bytes(), first_row);
    take(params.segments.ranges, ranges_bytes(), all_[0]->index * heads() * parts_);
    take(params.segments.sums, segment_sums_bytes(), first_row * 2);
    take(params.segments.grads, segment_grads_bytes(), first_row * grad_floats_);

    params.min_length = 1;
    params.max_length = max_symmetric_length_;
    params.first_slot = segment_slots_;
    for (const auto& [kernel, relations] :
         by_kernel(symmetric_, [&](const Relation& r) { return symmetric_kernel(r, call.causal); })) {
      const SymmetricPlan plan = plan_symmetric(props_, max_planes(relations, symmetric_planes_of, props_),
                                                round_up(max_symmetric_length_, kTile));
      fill(params, relations);
      params.capacity = plan.tokens;
      const int64_t blocks = params.num_relations * call.num_sequences * call.num_heads;
      launches.emplace_back(kernel, params, blocks, plan.warps * 32, plan.bytes);
    }
    add_row_wise(params, launches);
    if (call.values) launches.push_back(reduction(partials, weights));
    return launches;
  }

private:
  bool may_be_symmetric(const Relation& relation) const {
    return relation.self && call_.gradient && !call_.row_grads && relation.teacher.scale >= 0 &&
           relation.student.scale >= 0;
  }
  bool is_symmetric(const Relation* relation) const { return contains(symmetric_, relation); }
  bool is_segmented(const Relation* relation) const { return contains(segmented_, relation); }
  static bool contains(const std::vector<const Relation*>& relations, const Relation* relation) {
    return std::find(relations.begin(), relations.end(), relation) != relations.end();
  }

  // Plans the relations whose longer sequences are divided into windows.
  void plan_longer() {
    int64_t windows = 0;
    for (const Relation* relation : all_) {
      const Planes planes = symmetric_planes_of(*relation, props_);
      const SegmentPlan plan = plan_segments(props_, planes);
      if (!may_be_symmetric(*relation) || plan.warps == 0) continue;
      segmented_.push_back(relation);
      grad_floats_ = std::max(grad_floats_, 8 * planes.student_chunks);
      windows = std::max(windows, (call_.max_length + plan.window - 1) / plan.window);
    }
    const int64_t longer = std::min(call_.num_sequences, total_ / (max_symmetric_length_ + 1));
    parts_ = plan_parts(props_, static_cast<int64_t>(segmented_.size()) * call_.num_heads * longer, windows);
  }

  int64_t own() const { return row_wise_plan_.warps * kTile; }
  int64_t partials_bytes() const {
    return round_up(static_cast<int64_t>(all_.size()) * slots_ * static_cast<int64_t>(sizeof(double)), 256);
  }
  int64_t heads() const { return call_.num_sequences * call_.num_heads; }  // heads that a relation has
  int64_t rows() const { return static_cast<int64_t>(all_.size()) * call_.num_heads * total_; }
  int64_t row_stats_bytes() const { return row_wise_.empty() ? 0 : rows() * 4 * 4; }
  int64_t ranges_bytes() const {
    return segmented_.empty() ? 0
                              : round_up(static_cast<int64_t>(all_.size()) * heads() * parts_ * sizeof(HeadRange), 16);
  }
  int64_t segment_sums_bytes() const {
    return segmented_.empty() ? 0 : (1 + parts_ / 2) * round_up(rows() * 2 * 4, 16);
  }
  int64_t segment_grads_bytes() const { return segmented_.empty() ? 0 : parts_ / 2 * rows() * grad_floats_ * 4; }

  using Relations = std::vector<const Relation*>;

  // Groups relations by the kernel that they need. A group is computed by one launch.
  template <class Name>
  static std::vector<std::pair<std::string, Relations>> by_kernel(const Relations& from, const Name& name_of) {
    std::vector<std::pair<std::string, Relations>> groups;
    for (const Relation* relation : from) {
      std::string name = name_of(*relation);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == name; });
      if (group == groups.end()) group = groups.insert(groups.end(), {std::move(name), {}});
      group->second.push_back(relation);
    }
    return groups;
  }

  static void fill(LaunchParams& params, const std::vector<const Relation*>& relations) {
    params.num_relations = static_cast<int32_t>(relations.size());
    for (size_t i = 0; i < relations.size(); ++i) params.relations[i] = *relations[i];
  }

  void add_row_wise(LaunchParams& params, std::vector<Launch>& launches) const {
    if (row_wise_.empty()) return;
    const Call& call = call_;
    const int64_t blocks = row_blocks_ * call.num_heads;
    const SegmentParams scratch = params.segments;
    params.max_length = call.max_length;
    params.segments = {};
    auto add_row_wise = [&](const std::string& kernel, const Relations& relations) {
      fill(params, relations);
      params.capacity = row_wise_plan_.streamed;
      params.first_slot = segment_slots_ + symmetric_slots_;
      launches.emplace_back(kernel, params, blocks * params.num_relations, row_wise_plan_.warps * 32,
                            row_wise_plan_.bytes);
    };
    auto add_segments = [&](const std::string& kernel, const Relations& relations, int gradient) {
      const SegmentPlan plan = plan_segments(props_, symmetric_planes_of(*relations[0], props_));
      fill(params, relations);
      params.segments = scratch;
      params.segments.window = params.capacity = plan.window;
      params.segments.parts = parts_;
      params.segments.gradient = gradient;
      params.segments.grad_floats = grad_floats_;
      params.first_slot = 0;
      launches.emplace_back(kernel, params, params.num_relations * heads() * parts_, plan.warps * 32, plan.bytes);
    };
    // Relations of the symmetric kernel come without the sequences that it has already processed, and those of the
    // segment kernel, with all of its relations of a shape, last.
    Relations others, symmetric;
    for (const Relation* relation : row_wise_)
      if (!is_segmented(relation)) (is_symmetric(relation) ? symmetric : others).push_back(relation);
    auto add = [&](const Relations& relations, bool segmented) {
      for (const auto& [kernel, some] :
           by_kernel(relations, [&](const Relation& r) { return row_stats_kernel(r, call.gradient); })) {
        if (segmented) add_segments(segment_kernel(*some[0], call.causal), some, 0);
        add_row_wise(kernel, some);
      }
      for (const auto& [kernel, some] :
           by_kernel(relations, [&](const Relation& r) { return row_wise_kernel(r, call.gradient); })) {
        if (segmented) add_segments(segment_kernel(*some[0], call.causal), some, 1);
        add_row_wise(kernel, some);
        Relations crosses;
        for (const Relation* relation : some)
          if (!relation->self) crosses.push_back(relation);
        params.keys = 1;
        if (call.gradient && !crosses.empty()) add_row_wise(kernel, crosses);
        params.keys = 0;
      }
    };
    params.min_length = 1;
    add(others, false);
    params.min_length = max_symmetric_length_ + 1;
    add(symmetric, false);
    add(segmented_, true);
  }

  Launch reduction(const double* partials, const double* weights) const {
    ReduceParams reduction{};
    reduction.call = call_;
    reduction.partials = partials - all_[0]->index * slots_;
    reduction.slots = slots_;
    reduction.num_relations = static_cast<int32_t>(all_.size());
    reduction.weighted = weights != nullptr;
    reduction.accumulates = all_[0]->index > 0;
    for (size_t i = 0; i < all_.size(); ++i) {
      if (weights) reduction.weight[i] = static_cast<float>(weights[all_[i]->index]);
      reduction.index[i] = all_[i]->index;
      const int64_t rest = segment_slots_ + symmetric_slots_;
      reduction.first[i] = is_segmented(all_[i]) ? 0 : is_symmetric(all_[i]) ? segment_slots_ : rest;
      reduction.end[i] = contains(row_wise_, all_[i]) ? slots_ : rest;
    }
    return {reduction_kernel(), reduction, weights ? 1 : reduction.num_relations, 512, kScratchBytes};
  }

  const Call& call_;
  const DeviceProps& props_;
  std::vector<const Relation*> all_, symmetric_, segmented_, row_wise_;
  RowWisePlan row_wise_plan_{};
  int parts_ = 1, grad_floats_ = 0;
  int64_t total_ = 0, max_symmetric_length_ = 0, row_blocks_ = 0;
  int64_t segment_slots_ = 0, symmetric_slots_ = 0, slots_ = 0;
};

template <class Body>
void for_each_run(const Call& call, const Relation* relations, const DeviceProps& props, const Body& body) {
  for (int64_t first = 0; first < call.num_relations; first += kMaxRelations)
    body(Run(call, relations + first, std::min<int64_t>(kMaxRelations, call.num_relations - first), props));
}

// Launches kernels, or appends those that are not loaded to `missing`.
const char* launch_all(const std::vector<Launch>& launches, int device, void* stream, std::string& missing) {
  std::vector<std::string> not_loaded;
  for (const Launch& launch : launches)
    if (!is_loaded(device, launch.kernel) &&
        std::find(not_loaded.begin(), not_loaded.end(), launch.kernel) == not_loaded.end())
      not_loaded.push_back(launch.kernel);
  for (const std::string& kernel : not_loaded) missing += (missing.empty() ? "" : "\n") + kernel;
  if (!not_loaded.empty()) return nullptr;
  for (const Launch& one : launches)
    if (const char* error = launch(device, one, stream)) return error;
  return nullptr;
}

}  // namespace

std::string unsupported_reason(const std::vector<Relation>& relations, bool gradient, const DeviceProps& props) {
  if (props.capability < 80)
    return "it needs a GPU of compute capability 8.0 or more, this one has " + std::to_string(props.capability / 10) +
           "." + std::to_string(props.capability % 10);
  std::vector<const Relation*> all;
  for (const Relation& relation : relations) all.push_back(&relation);
  const Planes planes = max_planes(all, row_wise_planes_of, gradient);
  if (plan_row_wise(props, planes, gradient).warps == 0)
    return "heads of these widths and dtypes need " + std::to_string(row_wise_bytes(planes, kTile, kTile, gradient)) +
           " bytes of shared memory, but a block of this GPU has " + std::to_string(props.smem_per_block);
  return "";
}

int64_t scratch_bytes(const Call& call, const Masks& masks, const Relation* relations, const DeviceProps& props) {
  int64_t most = 0;
  bool too_large = false;
  for_each_run(call, relations, props, [&](const Run& run) {
    most = std::max(most, run.scratch_bytes());
    too_large |= run.too_large();
  });
  return too_large ? -1 : Sequences(call, masks).bytes() + most;
}

const char* run(Call call, const Masks& masks, const double* weights, const Relation* relations,
                const DeviceProps& props, int device, void* stream, void* scratch, std::string& missing) {
  std::vector<Launch> launches;
  const Sequences sequences(call, masks);
  sequences(call, static_cast<char*>(scratch), launches);
  for_each_run(call, relations, props, [&](const Run& run) {
    for (Launch& launch : run(static_cast<char*>(scratch) + sequences.bytes(), weights))
      if (launch.blocks > 0) launches.push_back(std::move(launch));
  });
  return launch_all(launches, device, stream, missing);
}

const char* scale(const std::vector<ScaledOutput>& outputs, const std::vector<ScaledPart>& parts, const float* upstream,
                  int64_t upstream_stride, int device, void* stream, std::string& missing) {
  constexpr int64_t kThreads = 256, kItems = kThreads * 8;  // elements of a block; see ScaleKernel
  std::vector<Launch> launches;
  for (size_t next = 0; next < outputs.size();) {
    ScaleParams params{};
    params.upstream = upstream;
    params.upstream_stride = upstream_stride;
    int64_t blocks = 0;
    int32_t used = 0;
    while (next < outputs.size() && params.num_outputs < kMaxScaledOutputs &&
           used + outputs[next].num_parts <= kMaxScaledParts) {
      ScaledOutput output = outputs[next++];
      std::copy_n(parts.begin() + output.first_part, output.num_parts, params.parts + used);
      output.first_part = used;
      output.first_block = blocks;
      used += output.num_parts;
      blocks += (output.numel + kItems - 1) / kItems;
      params.outputs[params.num_outputs++] = output;
    }
    if (params.num_outputs == 0 || blocks > kMaxBlocks) return "too many gradients of a tensor, or too large ones";
    if (blocks > 0) launches.emplace_back(scale_kernel(), params, blocks, static_cast<int>(kThreads), 0);
  }
  return launch_all(launches, device, stream, missing);
}

}  // namespace minilm::cuda
