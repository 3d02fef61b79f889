// Driver of the CPU backend: cuts a call into tasks, gives each its memory, and runs them on the caller's threads.
//
// What a task computes, and in which order it adds up, depends on its shape alone: never on the number of threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels.h"

namespace minilm::cpu {
namespace {

// All scratch memory of a call stays below this as long as its tasks without the exponentials that they keep do.
constexpr size_t kBudgetBytes = size_t{28} << 20;
// Exponentials that a task keeps between its two phases; the others are computed twice. docs/cpu.md: what it is worth.
constexpr size_t kKeptBytes = size_t{5} << 20;
// A call of so few tasks, or a task of so many tokens, is cut into chunks that run beside each other.
constexpr int64_t kFewTasks = 16, kManyTokens = 8192;
constexpr int64_t kMostChunks = 16, kChunkTokens = 256;
constexpr int64_t kEnoughChunks = 16;  // in a call of few tasks; each costs accumulators of its own
// Widest range of u_ii, in units of log 2, for which one reference serves all rows of a task. Numbers would allow
// 2 kMostBits, but scores far from the reference are rounded more coarsely than in a softmax of their own row.
constexpr float kWidestRange = 120.0f;
// Heads of one token lie side by side in memory: a thread gathers several of them before it computes the first.
constexpr int64_t kMostHeads = 8;
constexpr size_t kGatheredBytes = size_t{128} << 10;
// Fewer floats than this one thread has cleared before others would have begun.
constexpr int64_t kFewFloats = 1 << 15;
// Shorter sequences gain little by unordered pairs, and in a mean of so few rows rounding does not average out: they
// go row by row, in the exact form.
constexpr int64_t kFewTokens = 64;

// Kernels, and whether they take features in pairs: that pays where additions do not take the multipliers' place.
struct Variant {
  const char* name;
  const Kernels* kernels;
  bool paired;
};

// What this processor can run, best first.
std::vector<Variant> find_variants() {
  std::vector<Variant> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool adders = __builtin_cpu_is("amd");
  auto both = [&](const char* plain, const char* paired, const Kernels& kernels) {
    found.push_back({adders ? paired : plain, &kernels, adders});
    found.push_back({adders ? plain : paired, &kernels, !adders});
  };
  bool fma = __builtin_cpu_supports("fma");
  if (__builtin_cpu_supports("avx512f") && fma) both("avx512", "avx512-paired", kernels_avx512);
  if (__builtin_cpu_supports("avx2") && fma) both("avx2", "avx2-paired", kernels_avx2);
#endif
  found.push_back({"portable", &kernels_portable, false});
  return found;
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = find_variants();
  return found;
}

// Memory is laid out twice by the same code: once to learn its size, once for real.
class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + size_);
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
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

// One (sequence, relation, head) with everything that it needs.
struct Work {
  Task task;
  float* scratch[kMostChunks];
};

class Run {
 public:
  Run(const Call& call, const Threads& threads, const Variant& variant)
      : call_(call), threads_(threads), k_(*variant.kernels), paired_(variant.paired),
        gradient_(call.relations[0].query_grad != nullptr) {}

  void operator()() {
    std::vector<int64_t> order(call_.num_sequences);
    std::iota(order.begin(), order.end(), 0);
    order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t n) { return length(n) == 0; }), order.end());
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    int64_t heads = call_.num_heads, relations = call_.num_relations;
    kl_.assign(relations * call_.num_sequences * heads, 0.0);

    int64_t tasks = static_cast<int64_t>(order.size()) * relations * heads;
    size_t apart = 0;
    while (apart < order.size() && chunks(length(order[apart]), tasks) > 1) {
      run_in_chunks(order[apart], chunks(length(order[apart]), tasks));
      ++apart;
    }
    run_together(std::vector<int64_t>(order.begin() + apart, order.end()));
    if (gradient_ && !call_.packed) clear_hidden();

    if (call_.values)
      for (int64_t r = 0; r < relations; ++r) {
        double value = 0.0;
        for (int64_t n = 0; n < call_.num_sequences; ++n)
          for (int64_t a = 0; a < heads; ++a) value += call_.weights[n] * kl_at(n, r, a);
        call_.values[r] = static_cast<float>(value);
      }
  }

 private:
  int64_t length(int64_t n) const { return call_.starts[n + 1] - call_.starts[n]; }
  double& kl_at(int64_t n, int64_t r, int64_t a) { return kl_[(r * call_.num_sequences + n) * call_.num_heads + a]; }

  // Gradients of tokens that are not real.
  void clear_hidden() const {
    int64_t hidden = call_.num_sequences * call_.positions - call_.starts[call_.num_sequences];
    if (hidden == 0) return;
    bool few = hidden * call_.num_heads * call_.relations[0].student.query.width < kFewFloats;
    parallel(call_.num_sequences * call_.num_relations, few ? 1 : threads_.count, [&](int64_t, int64_t item) {
      int64_t n = item / call_.num_relations;
      const Relation& relation = call_.relations[item % call_.num_relations];
      auto clear = [&](float* grad, int64_t width) {
        int64_t token = call_.num_heads * width, from = 0;
        float* sequence = grad + n * call_.positions * token;
        auto up_to = [&](int64_t end) {
          if (end > from) std::memset(sequence + from * token, 0, (end - from) * token * sizeof(float));
          from = end + 1;
        };
        for (int64_t i = call_.starts[n]; i < call_.starts[n + 1]; ++i) up_to(call_.tokens[i]);
        up_to(call_.positions);
      };
      clear(relation.query_grad, relation.student.query.width);
      if (!relation.self) clear(relation.key_grad, relation.student.key.width);
    });
  }

  // Whether unordered pairs may be tried: a training scalar of a self relation whose scales are not negative.
  bool may_be_symmetric(int64_t r) const {
    const Relation& relation = call_.relations[r];
    return relation.self && gradient_ && call_.weights && relation.teacher.scale >= 0 && relation.student.scale >= 0;
  }

  int64_t padded(int64_t tokens) const {
    int64_t unit = std::max<int64_t>(k_.lanes, kStripRows);
    return (tokens + unit - 1) / unit * unit;
  }

  int64_t exponentials(int64_t tokens) const {
    int64_t blocks = 0;
    for (int64_t first = 0; first < tokens; first += kStripRows) blocks += (first + kStripRows - 2) / k_.lanes + 1;
    return blocks * 2 * kStripRows * k_.lanes;
  }

  int64_t chunks(int64_t tokens, int64_t tasks) const {
    if (tasks >= kFewTasks && tokens < kManyTokens) return 1;
    size_t one = size_of(tokens, 1, 1), more = size_of(tokens, 2, 1) - one;
    int64_t fit = one < kBudgetBytes ? static_cast<int64_t>((kBudgetBytes - one) / more) + 1 : 1;
    int64_t wanted = tokens < kManyTokens ? (kEnoughChunks + tasks - 1) / tasks : kMostChunks;
    return std::max<int64_t>(1, std::min({kMostChunks, wanted, tokens / kChunkTokens, fit}));
  }

  size_t size_of(int64_t tokens, int64_t chunks, int64_t heads) const {
    size_t most = 0;
    for (int64_t r = 0; r < call_.num_relations; ++r) {
      Layout layout(nullptr);
      std::array<Work, kMostHeads> work;
      lay_out(layout, r, tokens, chunks, 0, work.data(), heads);
      most = std::max(most, layout.size());
    }
    return most;
  }

  // Memory of `heads` tasks of one relation and sequence: tokens and gradients of each, all else once, for one at a
  // time. `keep`: bytes for exponentials, where the task is one chunk.
  void lay_out(Layout& layout, int64_t r, int64_t tokens, int64_t chunks, size_t keep, Work* work,
               int64_t heads) const {
    const Relation& relation = call_.relations[r];
    bool symmetric = may_be_symmetric(r);
    int64_t length = padded(tokens);
    auto side = [&](Side& side, const Half& half) {
      side.half = &half;
      side.width = half.key.width;
      side.key_rows = side.query_rows = nullptr;
      side.key_grads = side.query_grads = side.recent_grads = nullptr;
      side.keys = layout.take<float>(length * side.width);
      bool shared = relation.self && half.scale >= 0;
      side.queries = shared ? side.keys : layout.take<float>(length * side.width);
      side.norms = symmetric ? layout.take<float>(length) : nullptr;
      side.offsets = symmetric ? layout.take<float>(length) : nullptr;
      side.mean = symmetric ? layout.take<float>(side.width) : nullptr;
    };
    for (int64_t h = 0; h < heads; ++h) {
      Task& task = work[h].task;
      task.relation = &relation;
      task.length = tokens;
      task.blocks = length / k_.lanes;
      task.chunks = chunks;
      side(task.teacher, relation.teacher);
      side(task.student, relation.student);
      Side& student = task.student;
      if (!gradient_) continue;
      int64_t size = length * k_.row_floats(student.width);
      student.key_rows = layout.take<float>(size);
      student.query_rows = relation.self ? student.key_rows : layout.take<float>(size);
      student.key_grads = layout.take<float>(chunks * size);
      student.query_grads = relation.self ? student.key_grads : layout.take<float>(chunks * size);
      student.recent_grads = layout.take<float>(chunks * size);
    }
    Task& task = work[0].task;
    task.kl = layout.take<double>(chunks + 1);
    if (symmetric) {
      task.row_sums = layout.take<float>(3 * length);
      task.column_sums = layout.take<float>(chunks * 6 * length);
      task.inverse = layout.take<float>(2 * length);
    }
    // A panel of symmetric scores, or four strips of scores and exponentials.
    int64_t strip = std::max(4 * kStripRows * length, k_.panel_floats);
    for (int64_t c = 0; c < chunks; ++c) work[0].scratch[c] = layout.take<float>(strip);
    task.kept_size = symmetric ? static_cast<int64_t>(keep / sizeof(float)) : 0;
    task.kept = layout.take<float>(task.kept_size);
    for (int64_t h = 1; h < heads; ++h) {
      Work other = work[0];
      other.task.teacher = work[h].task.teacher;
      other.task.student = work[h].task.student;
      work[h] = other;
    }
  }

  void fill_in(Task& task, int64_t n, int64_t r, int64_t a) const {
    task.sequence = call_.packed ? 0 : n;
    task.head = a;
    task.tokens = call_.tokens + call_.starts[n];
    bool all = !call_.causal && !call_.prefixes;
    task.prefix = all ? task.length : call_.prefixes ? std::min(call_.prefixes[n], task.length) : 0;
    task.gradient = gradient_;
    task.paired = paired_;
    task.exact = !gradient_ || task.length < kFewTokens;
    task.weight = call_.weights ? call_.weights[n] : 1.0f;
    int64_t matrices = call_.packed ? 1 : call_.num_sequences;
    int64_t row = ((r * matrices + task.sequence) * call_.num_heads + a) * call_.positions;
    task.row_grads = call_.row_grads ? call_.row_grads + row : nullptr;
    task.rows = call_.rows ? call_.rows + row : nullptr;
    task.head_stride = call_.num_heads * task.student.width;
    if (gradient_) {
      const Relation& relation = call_.relations[r];
      int64_t at = (task.sequence * call_.positions * call_.num_heads + a) * task.student.width;
      task.query_out = relation.query_grad + at;
      task.key_out = relation.self ? task.query_out : relation.key_grad + at;
    }
  }

  // Whether one reference serves all rows of a side; then it has it. Not where anything is not finite.
  bool find_reference(const Task& task, const Side& side) const {
    k_.center(task, side);
    Range range = k_.range(side.norms, task.length);
    if (!(range.high - range.low <= kWidestRange)) return false;
    float reference = std::max(0.0f, range.high - kMostBits) + std::min(0.0f, range.low + kMostBits);
    if (reference != 0.0f) k_.shift(task, side, reference);
    return true;
  }

  void prepare(Task& task) const {
    task.symmetric = task.teacher.norms && task.length >= kFewTokens;
    if (task.symmetric && find_reference(task, task.teacher) && find_reference(task, task.student)) return;
    if (task.symmetric) {  // the tokens as they came, again
      const Task* only = &task;
      for (int64_t block = 0; block < task.blocks; ++block) k_.gather(&only, 1, block);
    }
    task.symmetric = false;
    k_.fold(task, task.teacher);
    k_.fold(task, task.student);
  }

  // body(worker, item) for every item; each worker takes the next item.
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

  void first_phase(Work& work, int64_t chunk) const {
    (work.task.symmetric ? k_.symmetric_sums : k_.strips)(work.task, chunk, work.scratch[chunk]);
  }

  void between_phases(Task& task) const {
    task.kl[task.chunks] = 0.0;
    if (task.symmetric) k_.symmetric_rows(task);
  }

  void second_phase(Work& work, int64_t chunk) const {
    if (work.task.symmetric) k_.symmetric_gradient(work.task, chunk, work.scratch[chunk]);
  }

  double kl_of(const Task& task) const {
    double kl = std::accumulate(task.kl, task.kl + task.chunks + 1, 0.0);
    return kl < 0.0 ? 0.0 : kl;  // NaN stays NaN
  }

  void run_stage(Work& work, int64_t stage, int64_t chunk) const {
    Task& task = work.task;
    const Task* only = &task;
    int64_t begin = chunk * task.blocks / task.chunks, end = (chunk + 1) * task.blocks / task.chunks;
    switch (stage) {
      case 0:
        for (int64_t block = begin; block < end; ++block) k_.gather(&only, 1, block);
        break;
      case 1: prepare(task); break;
      case 2: first_phase(work, chunk); break;
      case 3: between_phases(task); break;
      case 4: second_phase(work, chunk); break;
      default:
        for (int64_t block = begin; block < end; ++block) k_.scatter(task, block);
    }
  }

  // The tasks of one sequence, each cut into chunks; so many at a time that all threads find enough to do. A task's
  // stages follow each other, but no task waits for another: a thread that takes an item waits at most for items of
  // the same task, all of which were taken before.
  void run_in_chunks(int64_t n, int64_t chunks) {
    const std::array<int64_t, 6> items = {chunks, 1, chunks, 1, chunks, gradient_ ? chunks : 0};  // of a task's stages
    struct Underway {
      Work work;
      std::atomic<int64_t> done{0};
    };
    int64_t heads = call_.num_heads, tasks = call_.num_relations * heads;
    size_t size = size_of(length(n), chunks, 1);
    int64_t enough = (8 * threads_.count + chunks - 1) / chunks;
    int64_t most = std::max<int64_t>(1, std::min<int64_t>({tasks, enough, static_cast<int64_t>(kBudgetBytes / size)}));
    Memory memory(most * size);
    for (int64_t begin = 0; begin < tasks; begin += most) {
      int64_t count = std::min(most, tasks - begin);
      std::vector<Underway> underway(count);
      for (int64_t k = 0; k < count; ++k) {
        int64_t r = (begin + k) / heads, a = (begin + k) % heads;
        Layout layout(memory.data() + k * size);
        lay_out(layout, r, length(n), chunks, 0, &underway[k].work, 1);
        fill_in(underway[k].work.task, n, r, a);
      }
      int64_t all = count * std::accumulate(items.begin(), items.end(), int64_t{0});
      parallel(all, threads_.count, [&](int64_t, int64_t item) {
        int64_t stage = 0, before = 0;
        for (; item >= count * items[stage]; ++stage) {
          item -= count * items[stage];
          before += items[stage];
        }
        auto& [work, done] = underway[item / items[stage]];
        while (done.load(std::memory_order_acquire) < before) std::this_thread::yield();
        run_stage(work, stage, item % items[stage]);
        done.fetch_add(1, std::memory_order_release);
      });
      for (int64_t k = 0; k < count; ++k)
        kl_at(n, (begin + k) / heads, (begin + k) % heads) = kl_of(underway[k].work.task);
    }
  }

  void run_together(const std::vector<int64_t>& sequences) {
    if (sequences.empty()) return;
    int64_t relations = call_.num_relations, heads = call_.num_heads;
    int64_t tasks = static_cast<int64_t>(sequences.size()) * relations * heads;
    int64_t longest = length(sequences[0]);
    size_t one = size_of(longest, 1, 1), more = size_of(longest, 1, 2) - one;
    int64_t workers = std::min({tasks, threads_.count, std::max<int64_t>(1, kBudgetBytes / one)});
    int64_t together = std::max<int64_t>(1, std::min<int64_t>(kMostHeads, kGatheredBytes / more));
    while (together > 1 && tasks / together < 4 * workers) --together;
    size_t size = one + (together - 1) * more;
    size_t free = kBudgetBytes / workers > size ? kBudgetBytes / workers - size : 0;
    size_t keep = std::min({kKeptBytes, free, exponentials(longest) * sizeof(float)});
    size += keep + 64;
    Memory memory(workers * size);
    std::vector<Work> work(workers * together);
    int64_t groups = (heads + together - 1) / together;
    parallel(static_cast<int64_t>(sequences.size()) * relations * groups, workers, [&](int64_t worker, int64_t item) {
      int64_t n = sequences[item / (relations * groups)], r = item / groups % relations;
      int64_t first = item % groups * together, count = std::min(together, heads - first);
      Work* group = work.data() + worker * together;
      Layout layout(memory.data() + worker * size);
      lay_out(layout, r, length(n), 1, keep, group, count);
      for (int64_t h = 0; h < count; ++h) fill_in(group[h].task, n, r, first + h);
      std::array<const Task*, kMostHeads> tasks;
      for (int64_t h = 0; h < count; ++h) tasks[h] = &group[h].task;
      for (int64_t block = 0; block < group[0].task.blocks; ++block) k_.gather(tasks.data(), count, block);
      for (int64_t h = 0; h < count; ++h) {
        Task& task = group[h].task;
        prepare(task);
        first_phase(group[h], 0);
        between_phases(task);
        second_phase(group[h], 0);
        kl_at(n, r, first + h) = kl_of(task);
      }
      for (int64_t block = 0; gradient_ && block < group[0].task.blocks; ++block)
        for (int64_t h = 0; h < count; ++h) k_.scatter(group[h].task, block);
    });
  }

  const Call& call_;
  const Threads& threads_;
  const Kernels& k_;
  bool paired_, gradient_;
  std::vector<double> kl_;
};

}  // namespace

const char* const* instruction_sets() {
  static const auto names = [] {
    std::vector<const char*> found;
    for (const Variant& variant : variants()) found.push_back(variant.name);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

const char* run(const Call& call, const Threads& threads, const char* instruction_set) {
  auto chosen = std::find_if(variants().begin(), variants().end(),
                             [&](const Variant& variant) { return std::strcmp(variant.name, instruction_set) == 0; });
  if (chosen == variants().end()) return "this processor cannot run the instruction set asked for";
  if (call.num_relations == 0) return nullptr;
  try {
    Run(call, threads, *chosen)();
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
  return nullptr;
}

}  // namespace minilm::cpu
