// Driver of the CUDA backend: sorts a call's relations into launches and gives each its memory. Waits for nothing and
// reads nothing from the device, so a call can be captured in a CUDA graph.

#include "driver.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "gpu.h"
#include "plan.h"

namespace minilm::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a launch

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int student_pieces(const Relation& relation) { return planes_of(relation).student_pieces; }

Planes most(const std::vector<const Relation*>& relations) {
  Planes all{};
  for (const Relation* relation : relations) {
    const Planes one = planes_of(*relation);
    all = {std::max(all.teacher, one.teacher), std::max(all.student, one.student),
           std::max(all.student_chunks, one.student_chunks), std::max(all.student_pieces, one.student_pieces)};
  }
  return all;
}

// At most kMostRelations of a call's relations.
class Run {
 public:
  Run(const Call& call, const Limits& limits, int64_t first, int64_t count) : call_(call), limits_(limits) {
    const Common& common = call.common;
    total_ = common.packed ? common.positions : common.num_sequences * common.positions;
    for (int64_t r = first; r < first + count; ++r) {
      const Relation& relation = call.relations[r];
      all_.push_back(&relation);
      if (may_be_fused(relation)) fused_.push_back(&relation);
    }
    if (!fused_.empty())
      longest_fused_ = std::min<int64_t>(common.longest, plan_fused(limits, most(fused_), common.longest).tokens);
    const bool one_length = !common.packed && !common.padded;
    if (longest_fused_ == 0 || (one_length && longest_fused_ < common.longest)) {
      fused_.clear();
      longest_fused_ = 0;
    }
    for (const Relation* relation : all_)
      if (!is_fused(relation) || longest_fused_ < common.longest) rows_.push_back(relation);
    rows_plan_ = plan_rows(limits, most(rows_), common.gradient);
    fused_slots_ = common.num_sequences * common.num_heads;
    row_blocks_ = rows_.empty() ? 0 : total_ / own() + common.num_sequences;
    slots_ = fused_slots_ + row_blocks_ * common.num_heads;
  }

  int64_t scratch_bytes() const { return partials_bytes() + statistics_bytes(); }
  bool too_large() const { return static_cast<int64_t>(all_.size()) * slots_ > kMostBlocks; }  // each block has a slot

  // The launches, in their order.
  std::vector<Launch> operator()(char* scratch) const {
    const Common& common = call_.common;
    double* partials = reinterpret_cast<double*>(scratch);
    std::vector<Launch> launches;

    Batch batch{};
    batch.common = common;
    batch.partials = partials - all_[0]->index * slots_;  // relations are counted within this run
    batch.slots = slots_;
    batch.statistics = reinterpret_cast<float*>(scratch + partials_bytes()) - all_[0]->index * common.num_heads * total_;
    batch.statistics_stride = static_cast<int64_t>(all_.size()) * common.num_heads * total_;

    batch.shortest = 1;
    batch.longest = longest_fused_;
    for (const auto& [kernel, relations] :
         by_kernel(fused_, [&](const Relation& r) { return fused_kernel(r, common.causal); })) {
      const FusedPlan plan = plan_fused(limits_, most(relations), round_up(longest_fused_, kTile));
      fill(batch, relations);
      batch.capacity = plan.tokens;
      const int64_t blocks = batch.num_relations * common.num_sequences * common.num_heads;
      launches.emplace_back(kernel, batch, blocks, plan.warps * 32, plan.bytes);
    }
    add_rows(batch, launches);
    if (common.values) launches.push_back(reduction(partials));
    return launches;
  }

 private:
  bool may_be_fused(const Relation& relation) const {
    return relation.self && call_.common.gradient && call_.common.weights && relation.teacher.scale >= 0 &&
           relation.student.scale >= 0;
  }
  // Rows, evaluation and float32 gradients are to be as good as float32 can be; training in half precision is not.
  bool needs_exact(const Relation& relation) const {
    return !call_.common.gradient || student_pieces(relation) == 3;
  }
  bool is_fused(const Relation* relation) const {
    return std::find(fused_.begin(), fused_.end(), relation) != fused_.end();
  }
  int64_t own() const { return rows_plan_.warps * kTile; }
  int64_t partials_bytes() const {
    return round_up(static_cast<int64_t>(all_.size()) * slots_ * static_cast<int64_t>(sizeof(double)), 256);
  }
  int64_t statistics_bytes() const {
    return rows_.empty() ? 0 : static_cast<int64_t>(all_.size()) * call_.common.num_heads * total_ * 4 * 4;
  }

  using Relations = std::vector<const Relation*>;

  // Relations that one launch serves, with the launch's kernel, in the order of their first ones.
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

  static void fill(Batch& batch, const std::vector<const Relation*>& relations) {
    batch.num_relations = static_cast<int32_t>(relations.size());
    for (size_t i = 0; i < relations.size(); ++i) batch.relations[i] = *relations[i];
  }

  void add_rows(Batch& batch, std::vector<Launch>& launches) const {
    if (rows_.empty()) return;
    const Common& common = call_.common;
    const int64_t blocks = row_blocks_ * common.num_heads;
    batch.capacity = rows_plan_.others;
    batch.longest = common.longest;
    batch.first_slot = fused_slots_;
    auto add = [&](const std::string& kernel, const Relations& relations) {
      fill(batch, relations);
      launches.emplace_back(kernel, batch, blocks * batch.num_relations, rows_plan_.warps * 32, rows_plan_.bytes);
    };
    // Sequences that the fused kernel has served are left out, of the relations that it serves.
    for (bool fused : {false, true}) {
      Relations some;
      for (const Relation* relation : rows_)
        if (is_fused(relation) == fused) some.push_back(relation);
      batch.shortest = fused ? longest_fused_ + 1 : 1;
      batch.keys = 0;
      for (const auto& [kernel, relations] :
           by_kernel(some, [&](const Relation& r) { return statistics_kernel(r, needs_exact(r)); }))
        add(kernel, relations);
      for (const auto& [kernel, relations] :
           by_kernel(some, [&](const Relation& r) { return visit_kernel(r, common.gradient); })) {
        batch.keys = 0;
        add(kernel, relations);
        Relations crosses;
        for (const Relation* relation : relations)
          if (!relation->self) crosses.push_back(relation);
        batch.keys = 1;
        if (common.gradient && !crosses.empty()) add(kernel, crosses);
      }
    }
  }

  Launch reduction(const double* partials) const {
    Reduction reduction{};
    reduction.common = call_.common;
    reduction.partials = partials - all_[0]->index * slots_;
    reduction.slots = slots_;
    reduction.fused_slots = fused_slots_;
    reduction.num_relations = static_cast<int32_t>(all_.size());
    for (size_t i = 0; i < all_.size(); ++i) {
      reduction.index[i] = all_[i]->index;
      reduction.fused[i] = is_fused(all_[i]);
      reduction.rows[i] = std::find(rows_.begin(), rows_.end(), all_[i]) != rows_.end();
    }
    return {reduction_kernel(), reduction, reduction.num_relations, 256, 256};
  }

  const Call& call_;
  const Limits& limits_;
  std::vector<const Relation*> all_, fused_, rows_;
  RowsPlan rows_plan_{};
  int64_t total_ = 0, longest_fused_ = 0, fused_slots_ = 0, row_blocks_ = 0, slots_ = 0;
};

template <class Body>
void each_run(const Call& call, const Limits& limits, const Body& body) {
  for (int64_t first = 0; first < call.common.num_relations; first += kMostRelations) {
    Run run(call, limits, first, std::min<int64_t>(kMostRelations, call.common.num_relations - first));
    body(run);
  }
}

}  // namespace

std::string refusal(const Relation* relations, int64_t num_relations, bool gradient, const Limits& limits,
                    int capability) {
  if (capability < 80)
    return "it needs a GPU of compute capability 8.0 or more, this one has " + std::to_string(capability / 10) + "." +
           std::to_string(capability % 10);
  std::vector<const Relation*> all;
  for (int64_t r = 0; r < num_relations; ++r) all.push_back(&relations[r]);
  const Planes planes = most(all);
  if (plan_rows(limits, planes, gradient).warps == 0)
    return "heads of these widths and dtypes need " + std::to_string(rows_bytes(planes, kTile, kTile, gradient)) +
           " bytes of shared memory, a block of this GPU has " + std::to_string(limits.shared_per_block);
  return "";
}

int64_t scratch_bytes(const Call& call, const Limits& limits) {
  int64_t most = 0;
  bool too_large = false;
  each_run(call, limits, [&](Run& run) {
    most = std::max(most, run.scratch_bytes());
    too_large |= run.too_large();
  });
  return too_large ? -1 : most;
}

const char* run(const Call& call, const Limits& limits, int device, void* scratch, std::string& missing) {
  std::vector<Launch> launches;
  each_run(call, limits, [&](Run& run) {
    for (Launch& launch : run(static_cast<char*>(scratch)))
      if (launch.blocks > 0) launches.push_back(std::move(launch));
  });
  std::vector<std::string> unknown;
  for (const Launch& launch : launches)
    if (!is_loaded(device, launch.kernel) && std::find(unknown.begin(), unknown.end(), launch.kernel) == unknown.end())
      unknown.push_back(launch.kernel);
  for (const std::string& kernel : unknown) missing += (missing.empty() ? "" : "\n") + kernel;
  if (!unknown.empty()) return nullptr;
  for (const Launch& one : launches)
    if (const char* error = launch(device, one, call.stream)) return error;
  return nullptr;
}

}  // namespace minilm::cuda
