// Gradients of a row block's queries and of its keys, and sums with bounded rounding errors.
//
// Tokens and gradients are stored as [chunk][token][feature]. A chunk of features is two vectors, one vector or half a
// vector wide. If it is half a vector, two tokens share a vector and their features are interleaved. The last chunk is
// padded with zeros. With this layout, the score gradient of a pair is broadcast once for both gradients, and lanes are
// never summed.
#pragma once

namespace {

template <int kVectors_, bool kHalf_>
struct FeatureChunk {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kHalf = kHalf_;
  static constexpr int kTokens = kHalf ? 2 : 1;  // tokens that share the vectors
  static constexpr int kFloats = kVectors * V;
  static constexpr int kFeatures = kFloats / kTokens;
  static constexpr int kRows = kHalf ? kGradientRows : kGradientRows / kVectors;  // sums stay in registers
};

// Number of floats of one token, padding included.
int64_t token_floats(int64_t width) { return (width + V / 2 - 1) / (V / 2) * (V / 2); }

// Calls body(chunk, first feature of the chunk) for every chunk.
template <class Body>
MINILM_INLINE void for_each_chunk(int64_t width, const Body& body) {
  int64_t d = 0;
  for (; width - d > V + V / 2; d += 2 * V) body(FeatureChunk<2, false>(), d);
  if (width - d > V / 2) {
    body(FeatureChunk<1, false>(), d);
    d += V;
  }
  if (width - d > 0) body(FeatureChunk<1, true>(), d);
}

// query_grads[row] += Σ_j m[row][j] · keys[j] and key_grads[j] += Σ_row m[row][j] · queries[row] for kRows rows and
// `blocks` key blocks.
template <class C>
MINILM_INLINE void gradient_tile(const float* m, const float* queries, const float* keys, int64_t blocks,
                                 float* query_grads, float* key_grads) {
  constexpr int N = C::kVectors, kRows = C::kRows;
  F query[kRows][N], sum[kRows][N];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n) {
      if (C::kHalf) {
        F both = load(queries + r / 2 * V);
        query[r][n] = r % 2 ? dup_odd(both) : dup_even(both);
      } else {
        query[r][n] = load(queries + (r * N + n) * V);
      }
      sum[r][n] = set1(0.0f);
    }
  for (int64_t b = 0; b < blocks; ++b)
    for (int lane = 0; lane < V; lane += C::kTokens) {
      constexpr int kChains = kRows > 4 ? 2 : 1;  // two independent sums hide the latency of a long chain
      F key[N], grad[kChains][N];
      for (int n = 0; n < N; ++n) key[n] = load(keys + n * V);
      for (int r = 0; r < kRows; ++r) {
        const float* at = m + (b * R + r) * V + lane;
        F factor = C::kHalf ? set1_pair(at) : set1(*at);
        for (int n = 0; n < N; ++n) {
          sum[r][n] = fma(factor, key[n], sum[r][n]);
          F& to = grad[r % kChains][n];
          to = r < kChains ? mul(factor, query[r][n]) : fma(factor, query[r][n], to);
        }
      }
      for (int n = 0; n < N; ++n) {
        F both = kChains == 2 ? add(grad[0][n], grad[kChains - 1][n]) : grad[0][n];
        store(key_grads + n * V, add(load(key_grads + n * V), both));
      }
      keys += C::kFloats;
      key_grads += C::kFloats;
    }
  // The rows' gradients are added after those of the keys, because a row may be one of the keys.
  auto add_to = [](float* to, F x) { store(to, add(load(to), x)); };
  if (C::kHalf) {
    for (int r = 0; r < kRows; r += 2) {
      F even = sum[r][0], odd = sum[r + 1][0];
      add_to(query_grads + r / 2 * V, add(blend(even, odd), blend(dup_odd(even), dup_even(odd))));
    }
  } else {
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < N; ++n) add_to(query_grads + (r * N + n) * V, sum[r][n]);
  }
}

// Adds to the gradients of the row block that starts at row `first`, and to those of the keys in `blocks` blocks from
// `block` on. m: score gradients, [block][row][lane].
void gradients(const float* m, const Task& task, int64_t first, int64_t block, int64_t blocks, float* query_grads,
               float* key_grads) {
  const ModelBuffers& model = task.student;
  int64_t tokens = task.blocks * V;
  for_each_chunk(model.width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    int64_t begin = d * tokens, row = begin + first * C::kFeatures, key = begin + block * V * C::kFeatures;
    for (int64_t b = 0; b < blocks; b += kSweepBlocks) {
      int64_t count = blocks - b < kSweepBlocks ? blocks - b : kSweepBlocks;
      int64_t from = key + b * V * C::kFeatures;
      for (int r = 0; r < R; r += C::kRows)
        gradient_tile<C>(m + (b * R + r) * V, model.query_tokens + row + r * C::kFeatures, model.key_tokens + from,
                         count, query_grads + row + r * C::kFeatures, key_grads + from);
    }
  });
}

// sums[k] = sum of the lanes of x[k].
MINILM_INLINE void sum_lanes_of_four(F x[4], float* sums) {
  transpose_quads(x);
  store_sum_of_quads(sums, add(add(x[0], x[1]), add(x[2], x[3])));
}

MINILM_INLINE void set_zero(float* x, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) store(x + i * V, set1(0.0f));
}

// A sum in two steps: the terms of kFlushRowBlocks row blocks are summed first and then added to the total. This bounds
// the rounding error of long sequences.
class TwoStepSum {
public:
  TwoStepSum(float* recent, float* total, int64_t vectors) : recent_(recent), total_(total), vectors_(vectors) {
    set_zero(recent, vectors);
    set_zero(total, vectors);
  }
  float* recent() const { return recent_; }
  void end_row_block(bool last) {
    if (++row_blocks_ % kFlushRowBlocks != 0 && !last) return;
    for (int64_t i = 0; i < vectors_ * V; i += V) {
      store(total_ + i, add(load(total_ + i), load(recent_ + i)));
      store(recent_ + i, set1(0.0f));
    }
  }

private:
  float *recent_, *total_;
  int64_t vectors_, row_blocks_ = 0;
};

}  // namespace
