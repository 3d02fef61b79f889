// Gathers the valid tokens of a task into blocks of V lanes, and scatters the gradients back.
#pragma once

#include "gradients.inl"

namespace {

MINILM_INLINE float to_float(float x) { return x; }
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
MINILM_INLINE float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }
MINILM_INLINE float to_float(Float16 x) { return float16_to_float(x.bits); }

// A tensor and the head to read, and the memory to which its blocks are written.
struct GatherTarget {
  const TensorView* view;
  int64_t head;
  float* to;
};

// Transposes tokens into lanes, four features at a time. Contiguous float32 features are read directly. Other features
// are first converted into a buffer and padded with zeros. `of(task)` returns the tensor of a task. The addresses of
// neighbouring heads differ only in the offset of the head.
template <class T, class Of>
void gather_typed(const Task* const* tasks, int64_t heads, int64_t block, const Of& of) {
  constexpr int64_t kFeatures = 64;
  const Task& task = *tasks[0];
  const TensorView& view = *of(task).view;
  const int64_t* tokens = task.tokens + block * V;
  int64_t width = view.width, left = task.length - block * V, valid = left < V ? left : V;
  const T* base = static_cast<const T*>(view.data) + task.sequence * view.batch_stride;
  const T* rows[V];
  for (int lane = 0; lane < V; ++lane) rows[lane] = base + (lane < valid ? tokens[lane] * view.position_stride : 0);
  for (int64_t lane = V; lane < 2 * V && lane < left; ++lane) {
    // Prefetch the next block: its tokens lie on other pages, which the hardware prefetcher does not follow.
    const T* row = base + tokens[lane] * view.position_stride + of(task).head * view.head_stride;
    for (int64_t h = 0; h <= of(*tasks[heads - 1]).head - of(task).head; ++h)
      for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(row + h * view.head_stride + d);
  }
  bool direct = std::is_same<T, float>::value && view.feature_stride == 1 && width % 4 == 0 && valid == V;
  for (int64_t h = 0; h < heads; ++h) {
    const GatherTarget target = of(*tasks[h]);
    float* to = target.to + block * width * V;
    int64_t head = target.head * view.head_stride;
    auto transpose = [&](const float* const* from, int64_t at, float* __restrict out, int64_t features) {
      for (int64_t d = 0; d < features; d += 4) {
        F x[4];
        for (int k = 0; k < 4; ++k) x[k] = load_quads(from + k, at + d);
        transpose_quads(x);
        for (int k = 0; k < 4 && d + k < features; ++k) store(out + (d + k) * V, x[k]);
      }
    };
    if (direct) {
      transpose(reinterpret_cast<const float* const*>(rows), head, to, width);
      continue;
    }
    float converted[V][kFeatures];
    const float* from[V];
    for (int lane = 0; lane < V; ++lane) from[lane] = converted[lane];
    for (int64_t d = 0; d < width; d += kFeatures) {
      int64_t features = width - d < kFeatures ? width - d : kFeatures;
      for (int lane = 0; lane < V; ++lane) {
        const T* row = rows[lane] + head + d * view.feature_stride;
        int64_t known = lane < valid ? features : 0;
        if (view.feature_stride == 1)
          for (int64_t k = 0; k < known; ++k) converted[lane][k] = to_float(row[k]);
        else
          for (int64_t k = 0; k < known; ++k) converted[lane][k] = to_float(row[k * view.feature_stride]);
        for (int64_t k = known; k < (features + 3) / 4 * 4; ++k) converted[lane][k] = 0.0f;
      }
      transpose(from, 0, to + d * V, features);
    }
  }
}

template <class Of>
void gather_tensor(const Task* const* tasks, int64_t heads, int64_t block, const Of& of) {
  DType dtype = of(*tasks[0]).view->dtype;
  if (dtype == DType::float32) gather_typed<float>(tasks, heads, block, of);
  if (dtype == DType::float16) gather_typed<Float16>(tasks, heads, block, of);
  if (dtype == DType::bfloat16) gather_typed<BFloat16>(tasks, heads, block, of);
}

// Copies a block from [feature][lane] to the layout of gradients.inl.
void write_token_major(const float* x, int64_t width, int64_t block, int64_t tokens, float* rows) {
  for_each_chunk(width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    float* out = rows + d * tokens + block * V * C::kFeatures;
    if (C::kHalf) {
      float nothing[V] = {};
      for (int k = 0; k < C::kFeatures; ++k) {
        const float* lanes = d + k < width ? x + (d + k) * V : nothing;
        for (int t = 0; t < V / 2; ++t) __builtin_memcpy(out + t * V + 2 * k, lanes + 2 * t, 8);
      }
      return;
    }
    auto feature = [&](int64_t k) { return d + k < width ? load(x + (d + k) * V) : set1(0.0f); };
    for (int k = 0; k < C::kFeatures; k += 4) {
      F quads[4];
      float* to[V];
      for (int q = 0; q < 4; ++q) quads[q] = feature(k + q);
      transpose_quads(quads);
      for (int lane = 0; lane < V; ++lane) to[lane] = out + lane * C::kFeatures + k;
      for (int q = 0; q < 4; ++q) store_quads(to + q, quads[q]);
    }
  });
}

MINILM_INLINE bool counts(const Task& task, int64_t row) {
  return !task.query_mask || task.query_mask[task.tokens[row]];
}

// Sets the queries of rows that do not count to zero, because they may be NaN.
void clear_uncounted(const Task& task, int64_t block, float* queries, int64_t width) {
  if (!task.query_mask) return;
  for (int64_t lane = 0; lane < V && block * V + lane < task.length; ++lane)
    if (!counts(task, block * V + lane))
      for (int64_t d = 0; d < width; ++d) queries[(block * width + d) * V + lane] = 0.0f;
}

void gather(const Task* const* tasks, int64_t heads, int64_t block) {
  for (ModelBuffers Task::* model : {&Task::teacher, &Task::student}) {
    const ModelBuffers& one = tasks[0]->*model;
    gather_tensor(tasks, heads, block, [model](const Task& task) {
      const ModelBuffers& x = task.*model;
      return GatherTarget{&x.operands->key, x.key_head, x.keys};
    });
    if (one.queries != one.keys)
      gather_tensor(tasks, heads, block, [model](const Task& task) {
        const ModelBuffers& x = task.*model;
        return GatherTarget{&x.operands->query, task.head, x.queries};
      });
    for (int64_t h = 0; h < heads; ++h) {
      const ModelBuffers& x = tasks[h]->*model;
      if (x.queries != x.keys) clear_uncounted(*tasks[h], block, x.queries, x.width);
      int64_t tokens = tasks[h]->blocks * V, at = block * x.width * V;
      if (x.key_tokens) write_token_major(x.keys + at, x.width, block, tokens, x.key_tokens);
      if (x.query_tokens != x.key_tokens) write_token_major(x.queries + at, x.width, block, tokens, x.query_tokens);
    }
  }
}

// Writes one block of a gradient to its tokens, scaled and summed over the slices of the task.
void scatter_tensor(const Task& task, int64_t block, const float* grads, float* out) {
  int64_t width = task.student.width, tokens = task.blocks * V, size = tokens * token_floats(width);
  F factor = set1(task.student.operands->scale * task.weight);
  for_each_chunk(width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    const float* from = grads + d * tokens + block * V * C::kFeatures;
    int64_t features = width - d < C::kFeatures ? width - d : C::kFeatures;
    for (int lane = 0; lane < V; lane += C::kTokens) {
      float part[C::kTokens][C::kFeatures], *to[C::kTokens];
      for (int k = 0; k < C::kTokens; ++k) {
        int64_t i = block * V + lane + k;
        bool whole = i < task.length && features == C::kFeatures;
        to[k] = whole ? out + task.tokens[i] * task.head_stride + d : part[k];
      }
      for (int n = 0; n < C::kVectors; ++n) {
        const float* at = from + lane * C::kFeatures + n * V;
        F x = load(at);
        for (int64_t c = 1; c < task.slices; ++c) x = add(x, load(at + c * size));
        x = mul(x, factor);
        if (C::kHalf)
          store_halves(to[0], to[C::kTokens - 1], x);
        else
          store(to[0] + n * V, x);
      }
      for (int k = 0; k < C::kTokens; ++k)
        if (int64_t i = block * V + lane + k; features < C::kFeatures && i < task.length)
          for (int f = 0; f < features; ++f) out[task.tokens[i] * task.head_stride + d + f] = part[k][f];
    }
  });
}

void scatter(const Task& task, int64_t block) {
  scatter_tensor(task, block, task.student.key_grads, task.key_out);
  if (task.query_out != task.key_out) scatter_tensor(task, block, task.student.query_grads, task.query_out);
}

// If tokens are multiplied by this factor, their scores are in units of log 2: exp(s) = 2^u.
MINILM_INLINE float scale_factor(const ModelBuffers& model) {
  return std::sqrt(std::fabs(model.operands->scale) / kLn2);
}

// Sets mean to that of the keys, or to 0 in features whose deviation is larger: subtracting such a mean would only add
// rounding errors.
void find_mean(const Task& task, const ModelBuffers& model) {
  int64_t width = model.width;
  constexpr int kTogether = 8;  // features that are summed at the same time
  for (int64_t first = 0; first < width; first += kTogether) {
    int count = static_cast<int>(width - first < kTogether ? width - first : kTogether);
    F sums[kTogether], squares[kTogether];
    for (int k = 0; k < kTogether; ++k) sums[k] = squares[k] = set1(0.0f);
    auto add_key = [&](const float* keys, int k) __attribute__((always_inline)) {
      F x = load(keys + k * V);
      sums[k] = add(sums[k], x);
      squares[k] = fma(x, x, squares[k]);
    };
    for (int64_t b = 0; b < task.blocks; ++b) {
      const float* keys = model.keys + (b * width + first) * V;
      if (count == kTogether)
        for (int k = 0; k < kTogether; ++k) add_key(keys, k);
      else
        for (int k = 0; k < count; ++k) add_key(keys, k);
    }
    for (int k = 0; k < count; ++k) {
      float sum = sum_lanes(sums[k]), mean = sum / static_cast<float>(task.length);
      model.mean[first + k] = 2.0f * mean * sum > sum_lanes(squares[k]) ? mean : 0.0f;
    }
  }
}

// Subtracts the mean from keys that are not the queries, which changes no probability of a row, and applies the scale.
void center_keys(const Task& task, const ModelBuffers& model) {
  find_mean(task, model);
  float factor = scale_factor(model);
  F scale = set1(model.operands->scale < 0 ? -factor : factor);
  for (int64_t i = 0; i < task.blocks * model.width; ++i) {
    float *keys = model.keys + i * V, *queries = model.queries + i * V;
    store(keys, mul(sub(load(keys), set1(model.mean[i % model.width])), set1(factor)));
    store(queries, mul(load(queries), scale));
  }
}

}  // namespace
