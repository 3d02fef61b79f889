// The row-wise path, for any relation and any mask. One pass processes a row block with all keys that its rows see.
#pragma once

#include "exp2.inl"
#include "gather.inl"
#include "gradients.inl"
#include "scores.inl"

namespace {

struct Softmax {
  float max, inverse;
  double log2_sum;  // relative to max
};

// Subtracts the maximum from the scores u of one row, and writes the exponentials of the differences.
MINILM_INLINE Softmax softmax_of_row(float* u, float* exponentials, int64_t blocks) {
  F top = set1(kNegInf);
  for (int64_t b = 0; b < blocks; ++b) top = max(load(u + b * R * V), top);
  Softmax out;
  out.max = max_lanes(top);
  F sum = set1(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F x = sub(load(u + b * R * V), set1(out.max)), e = exp2_accurate(x);
    store(u + b * R * V, x);
    store(exponentials + b * R * V, e);
    sum = add(sum, e);
  }
  float l = sum_lanes(sum);
  out.inverse = 1.0f / l;
  out.log2_sum = std::log2(static_cast<double>(l));
  return out;
}

// KL divergence of one row: Σ p (e^δ - 1 - δ) = Σ (q - p) - Σ p δ with δ = log q - log p. With kExact, terms with |δ| <
// 1/4 are computed by their series, which does not cancel. If m is not null, the score gradients (q - p) · weight are
// written to m.
template <bool kExact>
MINILM_INLINE float row_kl(const float* u_t, const float* u_s, const float* e_t, const float* e_s, Softmax t, Softmax s,
                           float weight, int64_t blocks, float* m) {
  F shift = set1(static_cast<float>(t.log2_sum - s.log2_sum));
  F sum = set1(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F delta = mul(add(sub(load(u_s + b * R * V), load(u_t + b * R * V)), shift), set1(kLn2));
    F p = mul(load(e_t + b * R * V), set1(t.inverse));
    F x = sub(mul(load(e_s + b * R * V), set1(s.inverse)), p);
    F kl = fma(sub(set1(0.0f), p), delta, x);
    if (kExact) {
      F f = fma(delta, set1(1.0f / 720), set1(1.0f / 120));
      f = fma(delta, f, set1(1.0f / 24));
      f = fma(delta, f, set1(1.0f / 6));
      f = fma(delta, f, set1(0.5f));
      kl = select(magnitude_below(delta, 0.25f), mul(mul(p, delta), mul(delta, f)), kl);
    }
    sum = add(sum, kl);
    if (m) store(m + b * R * V, mul(x, set1(weight)));
  }
  return sum_lanes(sum);
}

MINILM_INLINE bool any_counts(const Task& task, int64_t first, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (counts(task, first + r)) return true;
  return false;
}

// If the rows are the keys, their mean has been subtracted (center).
MINILM_INLINE void row_scores(const ModelBuffers& model, int64_t first, int64_t blocks, float* u) {
  if (model.queries == model.keys)
    scores<Product::offset>({model.queries, first, model.keys, model.width, model.offsets + first, model.offsets},
                            blocks, u);
  else
    scores<Product::plain>({model.queries, first, model.keys, model.width}, blocks, u);
}

void row_wise(const Task& task, int64_t slice, float* scratch) {
  const ModelBuffers &t = task.teacher, &s = task.student;
  int64_t size = task.blocks * V * token_floats(s.width), block_floats = task.blocks * R * V;
  float *u_t = scratch, *u_s = u_t + block_floats, *e_t = u_s + block_floats, *e_s = e_t + block_floats;
  bool cross = s.query_grads != s.key_grads;
  int64_t vectors = task.gradient ? size / V : 0;
  TwoStepSum grads(s.recent_grads + slice * size, s.key_grads + slice * size, vectors);
  float* query_grads = cross ? s.query_grads + slice * size : grads.recent();
  if (cross) set_zero(query_grads, vectors);
  double total = 0.0;
  for (int64_t first = slice * R; first < task.length; first += task.slices * R) {
    int64_t rows = task.length - first < R ? task.length - first : R;
    bool last = first + task.slices * R >= task.length;
    if (!any_counts(task, first, rows)) {
      grads.end_row_block(last);
      continue;
    }
    int64_t most = first + rows > task.prefix ? first + rows : task.prefix;  // keys that the last row sees
    int64_t least = first + 1 > task.prefix ? first + 1 : task.prefix;       // keys that the first row sees
    int64_t blocks = (most - 1) / V + 1;
    row_scores(t, first, blocks, u_t);
    row_scores(s, first, blocks, u_s);
    for (int64_t b = least / V; b < blocks; ++b)
      for (int r = 0; r < R; ++r) {
        int64_t end = first + r + 1 > task.prefix ? first + r + 1 : task.prefix;
        Mask k = first_lanes((end < most ? end : most) - b * V);
        int64_t at = (b * R + r) * V;
        store(u_t + at, select(k, load(u_t + at), set1(kNegInf)));
        store(u_s + at, select(k, load(u_s + at), set1(kNegInf)));
      }
    for (int r = 0; r < R; ++r) {
      int64_t at = r * V;
      if (r >= rows || !counts(task, first + r)) {
        for (int64_t b = 0; b < blocks; ++b) store(e_t + b * R * V + at, set1(0.0f));
        continue;
      }
      int64_t token = task.tokens[first + r];
      Softmax row_t = softmax_of_row(u_t + at, e_t + at, blocks), row_s = softmax_of_row(u_s + at, e_s + at, blocks);
      float weight = task.row_grads ? task.row_grads[token] : 1.0f;
      float* m = task.gradient ? e_t + at : nullptr;
      float kl = task.exact ? row_kl<true>(u_t + at, u_s + at, e_t + at, e_s + at, row_t, row_s, weight, blocks, m)
                            : row_kl<false>(u_t + at, u_s + at, e_t + at, e_s + at, row_t, row_s, weight, blocks, m);
      if (task.row_values) task.row_values[token] = kl < 0.0f ? 0.0f : kl;
      total += kl;
    }
    if (task.gradient) gradients(e_t, task, first, 0, blocks, query_grads, grads.recent());
    grads.end_row_block(last);
  }
  task.kl[slice] = total;
}

}  // namespace
