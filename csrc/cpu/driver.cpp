// Driver of the CPU backend: divides a call into tasks, allocates their memory and runs them on the caller's threads.
//
// The order of every sum depends on shapes only, so results are the same for any number of threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels.h"

namespace minilm::cpu {
namespace {

// Limit for the scratch memory of a call, in bytes. A call exceeds it only if one task alone needs more.
constexpr size_t kMaxScratchBytes = size_t{28} << 20;
// Limit for the exponentials that a task caches between its two phases, in bytes. All others are computed twice;
// docs/cpu.md has the speedup.
constexpr size_t kExpCacheBytes = size_t{5} << 20;
// Calls with fewer than kFewTasks tasks, and tasks of kManyTokens tokens or more, are divided into slices that run in
// parallel.
constexpr int64_t kFewTasks = 16, kManyTokens = 8192;
constexpr int64_t kMaxSlices = 16, kSliceTokens = 256;
constexpr int64_t kTargetSlices = 16;  // slices of a call with few tasks; each slice needs its own accumulators
// A task takes the symmetric path if its u_ii lie in a range of at most this width, in units of log 2. A range of 2
// kMostBits would not overflow either, but scores far from the reference round more coarsely than in a softmax with a
// maximum per row.
constexpr float kMaxNormRange = 120.0f;
// Neighbouring heads of a token are contiguous in memory, so a thread gathers several heads at once.
constexpr int64_t kMaxHeads = 8;
constexpr size_t kGroupBytes = size_t{128} << 10;
// Below this size, clearing on one thread is faster than waking the pool.
constexpr int64_t kParallelClearFloats = 1 << 15;
// Sequences with fewer tokens take the row-wise path in its exact form. The symmetric path would save little time, and
// the rounding errors of so few rows do not average out.
constexpr int64_t kMinSymmetricTokens = 64;

// `paired`: multiply features in pairs (scores.inl), which is faster on processors with separate adders.
struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool paired;
};

// The instruction sets that this processor supports, best first.
std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool separate_adders = __builtin_cpu_is("amd");
  auto add_both = [&](const char* plain, const char* paired, const Kernels& kernels) {
    found.push_back({separate_adders ? paired : plain, &kernels, separate_adders});
    found.push_back({separate_adders ? plain : paired, &kernels, !separate_adders});
  };
  bool fma = __builtin_cpu_supports("fma");
  if (__builtin_cpu_supports("avx512f") && fma) add_both("avx512", "avx512-paired", kernels_avx512);
  if (__builtin_cpu_supports("avx2") && fma) add_both("avx2", "avx2-paired", kernels_avx2);
#endif
  found.push_back({"portable", &kernels_portable, false});
  return found;
}

const std::vector<InstructionSet>& all_instruction_sets() {
  static const std::vector<InstructionSet> found = find_instruction_sets();
  return found;
}

// Allocates parts of a memory block, one after another. With a null base, it only computes the total size.
class Layout {
public:
  explicit Layout(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  size_t size() const { return size_; }

private:
  char* base_;
  size_t size_ = 0;
};

class Memory {
public:
  explicit Memory(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))) {}
  ~Memory() { ::operator delete(data_, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

private:
  char* data_;
};

// A task and its scratch memory.
struct Work {
  Task task;
  float* scratch[kMaxSlices];
};

class Run {
public:
  Run(const Call& call, const Relation* relations, const ThreadPool& threads, const InstructionSet& set)
      : call_(call),
        relations_(relations),
        threads_(threads),
        k_(*set.kernels),
        paired_(set.paired),
        gradient_(call.gradient) {}

  void operator()() {
    std::vector<int64_t> order(call_.num_sequences);
    std::iota(order.begin(), order.end(), 0);
    order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t n) { return length(n) == 0; }), order.end());
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    int64_t heads = call_.num_heads, relations = call_.num_relations;
    kl_.assign(relations * call_.num_sequences * heads, 0.0);
    allocate_head_grads();

    int64_t tasks = static_cast<int64_t>(order.size()) * relations * heads;
    size_t sliced = 0;
    while (sliced < order.size() && slices(length(order[sliced]), tasks) > 1) {
      run_in_slices(order[sliced], slices(length(order[sliced]), tasks));
      ++sliced;
    }
    run_whole_tasks(std::vector<int64_t>(order.begin() + sliced, order.end()));
    sum_head_grads();
    if (gradient_ && !call_.packed) clear_padding();

    if (call_.values)
      for (int64_t r = 0; r < relations; ++r) {
        double value = 0.0;
        for (int64_t n = 0; n < call_.num_sequences; ++n)
          for (int64_t a = 0; a < heads; ++a) value += call_.weights[n] * kl_at(n, r, a);
        call_.values[r] = value < 0.0 ? 0.0f : static_cast<float>(value);  // NaN stays NaN
      }
  }

private:
  int64_t length(int64_t n) const { return call_.starts[n + 1] - call_.starts[n]; }
  double& kl_at(int64_t n, int64_t r, int64_t a) { return kl_[(r * call_.num_sequences + n) * call_.num_heads + a]; }

  // Tasks of query heads that share a key head cannot write to one gradient. Each writes to a buffer of its own, with
  // the layout of a key that has all heads.
  void allocate_head_grads() {
    head_grads_.resize(call_.num_relations);
    int64_t tokens = call_.packed ? call_.positions : call_.num_sequences * call_.positions;
    for (int64_t r = 0; gradient_ && r < call_.num_relations; ++r)
      if (const ModelOperands& student = relations_[r].student; student.group > 1)
        head_grads_[r].reset(new Memory(tokens * call_.num_heads * student.key.width * sizeof(float)));
  }

  float* head_grads(int64_t r) const { return reinterpret_cast<float*>(head_grads_[r]->data()); }

  void sum_head_grads() const {
    for (int64_t r = 0; r < call_.num_relations; ++r) {
      if (!head_grads_[r]) continue;
      int64_t group = relations_[r].student.group, width = relations_[r].student.key.width;
      int64_t key_heads = call_.num_heads / group;
      parallel(call_.num_sequences * key_heads, threads_.num_threads, [&](int64_t, int64_t item) {
        int64_t n = item / key_heads, first = call_.packed ? 0 : n * call_.positions;
        for (int64_t i = call_.starts[n]; i < call_.starts[n + 1]; ++i) {
          int64_t at = ((first + call_.tokens[i]) * key_heads + item % key_heads) * width;
          const float* from = head_grads(r) + at * group;
          for (int64_t d = 0; d < width; ++d) {
            float sum = from[d];
            for (int64_t h = 1; h < group; ++h) sum += from[h * width + d];
            relations_[r].key_grad[at + d] = sum;
          }
        }
      });
    }
  }

  // Sets the gradients of padding to zero.
  void clear_padding() const {
    int64_t padding = call_.num_sequences * call_.positions - call_.starts[call_.num_sequences];
    if (padding == 0) return;
    bool single_thread = padding * call_.num_heads * relations_[0].student.query.width < kParallelClearFloats;
    parallel(call_.num_sequences * call_.num_relations, single_thread ? 1 : threads_.num_threads,
             [&](int64_t, int64_t item) {
               int64_t n = item / call_.num_relations;
               const Relation& relation = relations_[item % call_.num_relations];
               auto clear = [&](float* grad, int64_t token) {
                 int64_t from = 0;
                 float* sequence = grad + n * call_.positions * token;
                 auto up_to = [&](int64_t end) {
                   if (end > from) std::memset(sequence + from * token, 0, (end - from) * token * sizeof(float));
                   from = end + 1;
                 };
                 for (int64_t i = call_.starts[n]; i < call_.starts[n + 1]; ++i) up_to(call_.tokens[i]);
                 up_to(call_.positions);
               };
               int64_t token = call_.num_heads * relation.student.query.width;
               clear(relation.query_grad, token);
               if (!relation.self) clear(relation.key_grad, token / relation.student.group);
             });
  }

  // The symmetric path needs a self relation with non-negative scales, a gradient, and one weight per sequence.
  bool may_be_symmetric(int64_t r) const {
    const Relation& relation = relations_[r];
    return relation.self && gradient_ && call_.weights && relation.teacher.scale >= 0 && relation.student.scale >= 0;
  }

  int64_t padded(int64_t tokens) const { return round_up(tokens, std::max<int64_t>(k_.lanes, kRowBlock)); }

  // Number of exponentials of one task.
  int64_t exponentials(int64_t tokens) const {
    int64_t blocks = 0;
    for (int64_t first = 0; first < tokens; first += kRowBlock) blocks += (first + kRowBlock - 2) / k_.lanes + 1;
    return blocks * 2 * kRowBlock * k_.lanes;
  }

  // Number of slices into which each task of a call with `tasks` tasks is divided.
  int64_t slices(int64_t tokens, int64_t tasks) const {
    if (tasks >= kFewTasks && tokens < kManyTokens) return 1;
    size_t one = size_of(tokens, 1, 1), more = size_of(tokens, 2, 1) - one;
    int64_t fit = one < kMaxScratchBytes ? static_cast<int64_t>((kMaxScratchBytes - one) / more) + 1 : 1;
    int64_t wanted = tokens < kManyTokens ? (kTargetSlices + tasks - 1) / tasks : kMaxSlices;
    return std::max<int64_t>(1, std::min({kMaxSlices, wanted, tokens / kSliceTokens, fit}));
  }

  // Number of bytes that `allocate` needs.
  size_t size_of(int64_t tokens, int64_t slices, int64_t heads) const {
    size_t most = 0;
    for (int64_t r = 0; r < call_.num_relations; ++r) {
      Layout layout(nullptr);
      std::array<Work, kMaxHeads> work;
      allocate(layout, r, tokens, slices, 0, work.data(), heads);
      most = std::max(most, layout.size());
    }
    return most;
  }

  // Allocates `heads` tasks of one relation and sequence, which are computed one after the other. Each has its own
  // tokens and gradients; all other memory is shared. `cache_bytes`: memory for exponentials, if a task has one slice.
  void allocate(Layout& layout, int64_t r, int64_t tokens, int64_t slices, size_t cache_bytes, Work* work,
                int64_t heads) const {
    const Relation& relation = relations_[r];
    bool symmetric = may_be_symmetric(r);
    int64_t length = padded(tokens);
    auto allocate_model = [&](ModelBuffers& model, const ModelOperands& operands) {
      model.operands = &operands;
      model.width = operands.key.width;
      model.key_tokens = model.query_tokens = nullptr;
      model.key_grads = model.query_grads = model.recent_grads = nullptr;
      model.keys = layout.take<float>(length * model.width);
      bool shared = relation.self && operands.scale >= 0;
      model.queries = shared ? model.keys : layout.take<float>(length * model.width);
      model.norms = shared ? layout.take<float>(length) : nullptr;
      model.offsets = shared ? layout.take<float>(length) : nullptr;
      model.mean = layout.take<float>(model.width);
    };
    for (int64_t h = 0; h < heads; ++h) {
      Task& task = work[h].task;
      task.relation = &relation;
      task.length = tokens;
      task.blocks = length / k_.lanes;
      task.slices = slices;
      allocate_model(task.teacher, relation.teacher);
      allocate_model(task.student, relation.student);
      ModelBuffers& student = task.student;
      if (!gradient_) continue;
      int64_t size = length * k_.token_floats(student.width);
      student.key_tokens = layout.take<float>(size);
      student.query_tokens = relation.self ? student.key_tokens : layout.take<float>(size);
      student.key_grads = layout.take<float>(slices * size);
      student.query_grads = relation.self ? student.key_grads : layout.take<float>(slices * size);
      student.recent_grads = layout.take<float>(slices * size);
    }
    Task& task = work[0].task;
    task.kl = layout.take<double>(slices + 1);
    if (symmetric) {
      task.row_sums = layout.take<float>(3 * length);
      task.column_sums = layout.take<float>(slices * 6 * length);
      task.inverse = layout.take<float>(2 * length);
    }
    // Symmetric path: a panel of scores. Row-wise path: scores and exponentials of a row block, for teacher and
    // student.
    int64_t scratch_size = std::max(4 * kRowBlock * length, k_.panel_floats);
    for (int64_t c = 0; c < slices; ++c) work[0].scratch[c] = layout.take<float>(scratch_size);
    task.exp_cache_size = symmetric ? static_cast<int64_t>(cache_bytes / sizeof(float)) : 0;
    task.exp_cache = layout.take<float>(task.exp_cache_size);
    for (int64_t h = 1; h < heads; ++h) {
      Work other = work[0];
      other.task.teacher = work[h].task.teacher;
      other.task.student = work[h].task.student;
      work[h] = other;
    }
  }

  void fill(Task& task, int64_t n, int64_t r, int64_t a) const {
    task.sequence = call_.packed ? 0 : n;
    task.head = a;
    task.tokens = call_.tokens + call_.starts[n];
    task.query_mask = call_.query_mask ? call_.query_mask + task.sequence * call_.positions : nullptr;
    task.teacher.key_head = a / relations_[r].teacher.group;
    task.student.key_head = a / relations_[r].student.group;
    bool all = !call_.causal && !call_.prefixes;
    task.prefix = all ? task.length : call_.prefixes ? std::min(call_.prefixes[n], task.length) : 0;
    task.gradient = gradient_;
    task.paired = paired_;
    task.exact = !gradient_ || task.length < kMinSymmetricTokens;
    task.weight = call_.weights ? call_.weights[n] : 1.0f;
    int64_t matrices = call_.packed ? 1 : call_.num_sequences;
    int64_t row = ((r * matrices + task.sequence) * call_.num_heads + a) * call_.positions;
    task.row_grads = call_.row_grads ? call_.row_grads + row : nullptr;
    task.row_values = call_.row_values ? call_.row_values + row : nullptr;
    task.head_stride = call_.num_heads * task.student.width;
    if (gradient_) {
      const Relation& relation = relations_[r];
      int64_t at = (task.sequence * call_.positions * call_.num_heads + a) * task.student.width;
      task.query_out = relation.query_grad + at;
      task.key_out = relation.self ? task.query_out : (head_grads_[r] ? head_grads(r) : relation.key_grad) + at;
    }
  }

  // Centers a model's tokens and sets the reference score. Returns false if no reference fits all rows or a value is
  // not finite.
  bool find_reference(const Task& task, const ModelBuffers& model) const {
    k_.center(task, model);
    Range range = k_.range(model.norms, task.length);
    if (!(range.high - range.low <= kMaxNormRange)) return false;
    float reference = std::max(0.0f, range.high - kMostBits) + std::min(0.0f, range.low + kMostBits);
    if (reference != 0.0f) k_.shift(task, model, reference);
    return true;
  }

  // Tells whether so few rows count that the row-wise path, which takes twice as long for a pair, is faster.
  bool few_rows_count(const Task& task) const {
    if (!task.query_mask) return false;
    int64_t pairs = 0;
    for (int64_t first = 0; first < task.length; first += kRowBlock) {
      int64_t end = std::min(first + kRowBlock, task.length);
      bool counted = std::any_of(task.tokens + first, task.tokens + end, [&](int64_t i) { return task.query_mask[i]; });
      if (counted) pairs += kRowBlock * std::max(end, task.prefix);
    }
    return 2 * pairs < task.length * task.length;
  }

  void prepare(Task& task) const {
    task.symmetric =
        may_be_symmetric(task.relation - relations_) && task.length >= kMinSymmetricTokens && !few_rows_count(task);
    if (task.symmetric && find_reference(task, task.teacher) && find_reference(task, task.student)) return;
    if (task.symmetric) {  // restore the tokens that find_reference changed
      const Task* only = &task;
      for (int64_t block = 0; block < task.blocks; ++block) k_.gather(&only, 1, block);
    }
    task.symmetric = task.paired = false;
    for (const ModelBuffers* model : {&task.teacher, &task.student})
      (model->queries == model->keys ? k_.center : k_.center_keys)(task, *model);
  }

  // Calls body(worker, item) for every item. Workers take the next item as soon as they are free.
  template <class Body>
  void parallel(int64_t items, int64_t workers, const Body& body) const {
    struct Context {
      const Body& body;
      int64_t items;
      std::atomic<int64_t> next;
    } context{body, items, {0}};
    threads_.run(
        std::min(items, workers),
        [](void* raw, int64_t worker) {
          auto& context = *static_cast<Context*>(raw);
          for (int64_t item; (item = context.next.fetch_add(1, std::memory_order_relaxed)) < context.items;)
            context.body(worker, item);
        },
        &context);
  }

  void phase_1(Work& work, int64_t slice) const {
    (work.task.symmetric ? k_.symmetric_sums : k_.row_wise)(work.task, slice, work.scratch[slice]);
  }

  void between_phases(Task& task) const {
    task.kl[task.slices] = 0.0;
    if (task.symmetric) k_.symmetric_rows(task);
  }

  void phase_2(Work& work, int64_t slice) const {
    if (work.task.symmetric) k_.symmetric_gradient(work.task, slice, work.scratch[slice]);
  }

  // A divergence near 0 may round to a negative number. Only the sum over all tasks is clamped to 0: the positive
  // errors alone would be a bias.
  double kl_of(const Task& task) const { return std::accumulate(task.kl, task.kl + task.slices + 1, 0.0); }

  void run_stage(Work& work, int64_t stage, int64_t slice) const {
    Task& task = work.task;
    const Task* only = &task;
    int64_t begin = slice * task.blocks / task.slices, end = (slice + 1) * task.blocks / task.slices;
    switch (stage) {
      case 0:
        for (int64_t block = begin; block < end; ++block) k_.gather(&only, 1, block);
        break;
      case 1: prepare(task); break;
      case 2: phase_1(work, slice); break;
      case 3: between_phases(task); break;
      case 4: phase_2(work, slice); break;
      default:
        for (int64_t block = begin; block < end; ++block) k_.scatter(task, block);
    }
  }

  // Runs the tasks of one sequence in slices, with enough tasks at the same time to keep all threads busy. The stages
  // of a task run in order: a thread may wait for earlier items of the same task, which other threads have already
  // taken. It never waits for another task.
  void run_in_slices(int64_t n, int64_t slices) {
    const std::array<int64_t, 6> items = {slices, 1, slices, 1, slices, gradient_ ? slices : 0};  // per stage
    struct RunningTask {
      Work work;
      std::atomic<int64_t> done{0};
    };
    int64_t heads = call_.num_heads, tasks = call_.num_relations * heads;
    size_t size = size_of(length(n), slices, 1);
    int64_t enough = (8 * threads_.num_threads + slices - 1) / slices;
    int64_t most =
        std::max<int64_t>(1, std::min<int64_t>({tasks, enough, static_cast<int64_t>(kMaxScratchBytes / size)}));
    Memory memory(most * size);
    for (int64_t begin = 0; begin < tasks; begin += most) {
      int64_t count = std::min(most, tasks - begin);
      std::vector<RunningTask> running(count);
      for (int64_t k = 0; k < count; ++k) {
        int64_t r = (begin + k) / heads, a = (begin + k) % heads;
        Layout layout(memory.data() + k * size);
        allocate(layout, r, length(n), slices, 0, &running[k].work, 1);
        fill(running[k].work.task, n, r, a);
      }
      int64_t all = count * std::accumulate(items.begin(), items.end(), int64_t{0});
      parallel(all, threads_.num_threads, [&](int64_t, int64_t item) {
        int64_t stage = 0, before = 0;
        for (; item >= count * items[stage]; ++stage) {
          item -= count * items[stage];
          before += items[stage];
        }
        auto& [work, done] = running[item / items[stage]];
        while (done.load(std::memory_order_acquire) < before) std::this_thread::yield();
        run_stage(work, stage, item % items[stage]);
        done.fetch_add(1, std::memory_order_release);
      });
      for (int64_t k = 0; k < count; ++k)
        kl_at(n, (begin + k) / heads, (begin + k) % heads) = kl_of(running[k].work.task);
    }
  }

  // Runs the tasks of the given sequences, one task per thread at a time.
  void run_whole_tasks(const std::vector<int64_t>& sequences) {
    if (sequences.empty()) return;
    int64_t relations = call_.num_relations, heads = call_.num_heads;
    int64_t tasks = static_cast<int64_t>(sequences.size()) * relations * heads;
    int64_t longest = length(sequences[0]);
    size_t one = size_of(longest, 1, 1), more = size_of(longest, 1, 2) - one;
    int64_t workers = std::min({tasks, threads_.num_threads, std::max<int64_t>(1, kMaxScratchBytes / one)});
    int64_t group_size = std::max<int64_t>(1, std::min<int64_t>(kMaxHeads, kGroupBytes / more));
    while (group_size > 1 && tasks / group_size < 4 * workers) --group_size;
    size_t size = one + (group_size - 1) * more;
    size_t free = kMaxScratchBytes / workers > size ? kMaxScratchBytes / workers - size : 0;
    size_t cache_bytes = std::min({kExpCacheBytes, free, exponentials(longest) * sizeof(float)});
    size += cache_bytes + 64;
    Memory memory(workers * size);
    std::vector<Work> work(workers * group_size);
    int64_t groups = (heads + group_size - 1) / group_size;
    parallel(static_cast<int64_t>(sequences.size()) * relations * groups, workers, [&](int64_t worker, int64_t item) {
      int64_t n = sequences[item / (relations * groups)], r = item / groups % relations;
      int64_t first = item % groups * group_size, count = std::min(group_size, heads - first);
      Work* group = work.data() + worker * group_size;
      Layout layout(memory.data() + worker * size);
      allocate(layout, r, length(n), 1, cache_bytes, group, count);
      for (int64_t h = 0; h < count; ++h) fill(group[h].task, n, r, first + h);
      std::array<const Task*, kMaxHeads> tasks;
      for (int64_t h = 0; h < count; ++h) tasks[h] = &group[h].task;
      for (int64_t block = 0; block < group[0].task.blocks; ++block) k_.gather(tasks.data(), count, block);
      for (int64_t h = 0; h < count; ++h) {
        Task& task = group[h].task;
        prepare(task);
        phase_1(group[h], 0);
        between_phases(task);
        phase_2(group[h], 0);
        kl_at(n, r, first + h) = kl_of(task);
      }
      for (int64_t block = 0; gradient_ && block < group[0].task.blocks; ++block)
        for (int64_t h = 0; h < count; ++h) k_.scatter(group[h].task, block);
    });
  }

  const Call& call_;
  const Relation* relations_;
  const ThreadPool& threads_;
  const Kernels& k_;
  bool paired_, gradient_;
  std::vector<double> kl_;
  std::vector<std::unique_ptr<Memory>> head_grads_;  // per relation; null if keys have all heads
};

}  // namespace

const char* const* instruction_sets() {
  static const auto names = [] {
    std::vector<const char*> found;
    for (const InstructionSet& set : all_instruction_sets()) found.push_back(set.name);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

const char* run(const Call& call, const Relation* relations, const ThreadPool& threads, const char* instruction_set) {
  auto chosen = std::find_if(all_instruction_sets().begin(), all_instruction_sets().end(),
                             [&](const InstructionSet& set) { return std::strcmp(set.name, instruction_set) == 0; });
  if (chosen == all_instruction_sets().end()) return "this processor does not support the requested instruction set";
  if (call.num_relations == 0) return nullptr;
  try {
    Run(call, relations, threads, *chosen)();
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
  return nullptr;
}

}  // namespace minilm::cpu
