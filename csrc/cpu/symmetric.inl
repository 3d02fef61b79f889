// The symmetric path: self relations with one reference score for all rows, so that E_ij = E_ji is computed once.
//
// u_ij = s_ij - reference, E_ij = 2^u_ij, p_ij = E_ij / Σ_k E_ik. A block of rows i is combined with the keys j < i.
// Each exponential is used for the pair (i, j) and, where row j sees key i (i lies in the prefix), for the mirrored
// pair (j, i). A tile is `full` if all its pairs and all mirrored pairs are visible; tiles at the diagonal and at the
// end of the prefix need masks. The diagonal is handled separately: where p_ii is close to 1, q_ii - p_ii is computed
// from the other keys.
#pragma once

#include "exp2.inl"
#include "gather.inl"
#include "gradients.inl"
#include "scores.inl"

namespace {

// Smallest and largest of x; NaN unless all are finite.
Range range(const float* x, int64_t count) {
  F high = set1(x[0]), low = sub(set1(0.0f), high), finite = set1(0.0f);
  for (int64_t i = 0; i < count; i += V) {
    F y = select(first_lanes(count - i), load(x + i), set1(x[0]));
    high = max(y, high);
    low = max(sub(set1(0.0f), y), low);
    finite = fma(y, set1(0.0f), finite);
  }
  float zero_or_nan = sum_lanes(finite);
  return {zero_or_nan - max_lanes(low), zero_or_nan + max_lanes(high)};
}

// Subtracts the mean μ of all tokens, then applies the scale. With x̃ = x - μ, b_i = μ·x̃_i and the reference |μ|²,
// u_ij = x̃_i·x̃_j + b_i + b_j: scores round at the size of their differences, even if all tokens share large features.
// Sets offsets to b_i and norms to u_ii.
void center(const Task& task, const ModelBuffers& model) {
  find_mean(task, model);
  int64_t width = model.width;
  float factor = scale_factor(model);
  for (int64_t b = 0; b < task.blocks; ++b) {
    float* keys = model.keys + b * width * V;
    F offset = set1(0.0f), square = set1(0.0f), products = set1(0.0f);
    auto single = [&](int64_t d) __attribute__((always_inline)) {
      F x = mul(sub(load(keys + d * V), set1(model.mean[d])), set1(factor));
      store(keys + d * V, x);
      offset = fma(x, set1(model.mean[d] * factor), offset);
      square = fma(x, x, square);
      return x;
    };
    auto paired = [&](int64_t d) __attribute__((always_inline)) {
      F x = single(d), y = single(d + 1);
      products = fma(x, y, products);
    };
    if (task.paired)
      for_each_feature(width, paired, single);
    else
      for (int64_t d = 0; d < width; ++d) single(d);
    store(model.norms + b * V, add(square, add(offset, offset)));
    store(model.offsets + b * V, sub(offset, products));
  }
}

// Adds `reference` to the reference score.
void shift(const Task& task, const ModelBuffers& model, float reference) {
  for (int64_t i = 0; i < task.blocks * V; i += V) {
    store(model.offsets + i, sub(load(model.offsets + i), set1(reference / 2)));
    store(model.norms + i, sub(load(model.norms + i), set1(reference)));
  }
}

// Masks of the visible pairs (row, key) of a tile, and of its visible mirrored pairs (key, row).
struct PairMask {
  Mask visible[R], mirrored[R];
};

MINILM_INLINE bool is_full(const Task& task, int64_t first, int64_t block) {
  return (block + 1) * V <= first && first + R <= task.prefix;
}

MINILM_INLINE PairMask pair_mask(const Task& task, int64_t first, int64_t block) {
  PairMask pairs;
  for (int r = 0; r < R; ++r) {
    int64_t before = first + r - block * V;
    pairs.visible[r] = first_lanes(before);
    pairs.mirrored[r] = first_lanes(first + r < task.prefix ? before : 0);
  }
  return pairs;
}

// Number of key blocks that the row block starting at row `first` is combined with.
MINILM_INLINE int64_t key_blocks(int64_t first) { return (first + R - 2) / V + 1; }

// Adds the exponentials of one key block to the sums of kSumRows rows and of the block's keys (columns).
template <bool kFull, bool kStoreExp>
MINILM_INLINE void sums_of_block(const float* u_t, const float* u_s, float* exponentials, const PairMask* pairs, int r0,
                                 F row[][3], float* columns, int64_t column_stride) {
  F e_t[kSumRows], e_s[kSumRows], column_y = load(columns + 2 * column_stride);
  for (int r = 0; r < kSumRows; ++r) {
    F a_t = load(u_t + (r0 + r) * V), a_s = load(u_s + (r0 + r) * V);
    F difference = sub(a_s, a_t);
    e_t[r] = exp2_fast(a_t);
    e_s[r] = exp2_fast(a_s);
    if (!kFull) {
      e_t[r] = maskz(pairs->visible[r0 + r], e_t[r]);
      e_s[r] = maskz(pairs->visible[r0 + r], e_s[r]);
    }
    if (kStoreExp) {
      store(exponentials + (r0 + r) * V, e_t[r]);
      store(exponentials + (R + r0 + r) * V, e_s[r]);
    }
    row[r][0] = add(row[r][0], e_t[r]);
    row[r][1] = add(row[r][1], e_s[r]);
    row[r][2] = fma(e_t[r], difference, row[r][2]);
    if (!kFull) {
      e_t[r] = maskz(pairs->mirrored[r0 + r], e_t[r]);
      e_s[r] = maskz(pairs->mirrored[r0 + r], e_s[r]);
    }
    column_y = fma(e_t[r], difference, column_y);
  }
  static_assert(kSumRows == 4, "c_t and c_s add four rows");
  F c_t = add(add(e_t[0], e_t[1]), add(e_t[2], e_t[3]));
  F c_s = add(add(e_s[0], e_s[1]), add(e_s[2], e_s[3]));
  store(columns, add(load(columns), c_t));
  store(columns + column_stride, add(load(columns + column_stride), c_s));
  store(columns + 2 * column_stride, column_y);
}

// Adds the exponentials of a row block and a panel of keys to the same sums.
template <bool kStoreExp>
MINILM_INLINE void sums_of_panel(const Task& task, int64_t first, int64_t block, int64_t blocks, const float* u_t,
                                 const float* u_s, float* exponentials, F row[][3], float* columns) {
  int64_t padded = task.blocks * V;
  for (int r = 0; r < R; r += kSumRows) {
    F part[kSumRows][3];
    for (int k = 0; k < kSumRows * 3; ++k) part[k / 3][k % 3] = row[r + k / 3][k % 3];
    for (int64_t b = 0; b < blocks; ++b) {
      const float *t = u_t + b * R * V, *s = u_s + b * R * V;
      float *column = columns + (block + b) * V, *e = exponentials + b * 2 * R * V;
      if (is_full(task, first, block + b)) {
        sums_of_block<true, kStoreExp>(t, s, e, nullptr, r, part, column, padded);
      } else {
        PairMask pairs = pair_mask(task, first, block + b);
        sums_of_block<false, kStoreExp>(t, s, e, &pairs, r, part, column, padded);
      }
    }
    for (int k = 0; k < kSumRows * 3; ++k) row[r + k / 3][k % 3] = part[k / 3][k % 3];
  }
}

MINILM_INLINE void panel_scores(const Task& task, int64_t first, int64_t block, int64_t blocks, float* u_t,
                                float* u_s) {
  auto model_scores = [&](const ModelBuffers& x, float* u) {
    ScoreInput in{x.keys, first, x.keys + block * x.width * V, x.width, x.offsets + first, x.offsets + block * V};
    task.paired ? scores<Product::paired>(in, blocks, u) : scores<Product::offset>(in, blocks, u);
  };
  model_scores(task.teacher, u_t);
  model_scores(task.student, u_s);
}

MINILM_INLINE int64_t last_row_block(const Task& task, int64_t slice) {
  int64_t step = task.slices * R;
  return slice * R + (task.length - 1 - slice * R) / step * step;
}

// Caches the exponentials of as many of phase 1's last row blocks as fit. Phase 2 iterates backwards, so that it first
// reads the exponentials that were written last and are still in the processor's cache.
struct ExpCache {
  int64_t from;  // first row of the earliest cached row block
  float *begin, *end;
};

MINILM_INLINE int64_t cached_floats(int64_t first) { return key_blocks(first) * 2 * R * V; }

MINILM_INLINE ExpCache exp_cache_of(const Task& task, int64_t slice) {
  int64_t first = last_row_block(task, slice), size = 0;
  for (; first >= 0 && size + cached_floats(first) <= task.exp_cache_size; first -= task.slices * R)
    size += cached_floats(first);
  return {first + task.slices * R, task.exp_cache, task.exp_cache + size};
}

void symmetric_sums(const Task& task, int64_t slice, float* scratch) {
  int64_t padded = task.blocks * V;
  float* column_sums = task.column_sums + slice * 6 * padded;
  TwoStepSum columns(column_sums, column_sums + 3 * padded, 3 * task.blocks);
  float *u_t = scratch, *u_s = scratch + kPanelBlocks * R * V;
  ExpCache exp_cache = exp_cache_of(task, slice);
  for (int64_t first = slice * R; first < task.length; first += task.slices * R) {
    F row[R][3];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < 3; ++k) row[r][k] = set1(0.0f);
    int64_t end = key_blocks(first);
    float* exponentials = first >= exp_cache.from ? exp_cache.begin : nullptr;
    if (exponentials) exp_cache.begin += cached_floats(first);
    for (int64_t block = 0; block < end; block += kPanelBlocks) {
      int64_t blocks = end - block < kPanelBlocks ? end - block : kPanelBlocks;
      panel_scores(task, first, block, blocks, u_t, u_s);
      if (exponentials) {
        sums_of_panel<true>(task, first, block, blocks, u_t, u_s, exponentials, row, columns.recent());
        exponentials += blocks * 2 * R * V;
      } else {
        sums_of_panel<false>(task, first, block, blocks, u_t, u_s, u_t, row, columns.recent());
      }
    }
    for (int r = 0; r < R; r += 4)
      for (int k = 0; k < 3; ++k) {
        F x[4] = {row[r][k], row[r + 1][k], row[r + 2][k], row[r + 3][k]};
        sum_lanes_of_four(x, task.row_sums + k * padded + first + r);
      }
    columns.end_row_block(first + task.slices * R >= task.length);
  }
}

// Σ log2 x of positive normal floats: adds the exponents and multiplies the significands, each of which is below 2.
struct Log2Sum {
  double significand = 1.0;
  int64_t exponent = 0, count = 0;

  void add(float x) {
    uint32_t bits = as_bits(x);
    exponent += static_cast<int64_t>(bits >> 23) - 127;
    significand *= as_float((bits & 0x7fffffu) | 0x3f800000u);
    if (++count % 512 == 0) renormalize();
  }
  void renormalize() {
    int power;
    significand = std::frexp(significand, &power);
    exponent += power;
  }
  double value() const { return static_cast<double>(exponent) + std::log2(significand); }
};

// Runs between the phases. Computes 1 / Σ E, the score gradient of the diagonal, and the part of the KL divergence that
// needs no further pass: Σ_i (q_ii - p_ii) - ln 2 Σ_i [ Σ_j p_ij (u_s - u_t)_ij - log2 (l_s / l_t) ].
void symmetric_rows(const Task& task) {
  int64_t padded = task.blocks * V;
  float *l_t = task.row_sums, *l_s = l_t + padded, *y = l_s + padded;
  float *inverse_t = task.inverse, *inverse_s = inverse_t + padded, *diagonal = task.student.norms;
  double excess = 0.0;
  for (int64_t i = 0; i < padded; i += V) {
    F sums[3];
    for (int k = 0; k < 3; ++k) {
      sums[k] = load(task.row_sums + k * padded + i);
      for (int64_t c = 0; c < task.slices; ++c)
        sums[k] = add(sums[k], load(task.column_sums + (c * 6 + 3 + k) * padded + i));
    }
    Mask valid = first_lanes(task.length - i);
    F u_t = load(task.teacher.norms + i), u_s = load(task.student.norms + i);
    F e_t = maskz(valid, exp2_accurate(u_t)), e_s = maskz(valid, exp2_accurate(u_s));
    F all_t = add(sums[0], e_t), all_s = add(sums[1], e_s);
    F i_t = maskz(valid, div(set1(1.0f), all_t)), i_s = maskz(valid, div(set1(1.0f), all_s));
    if (task.query_mask) {  // with p = q = 0, a row has neither value nor gradient
      float counted[V];
      for (int lane = 0; lane < V; ++lane) counted[lane] = i + lane < task.length && counts(task, i + lane);
      i_t = mul(i_t, load(counted));
      i_s = mul(i_s, load(counted));
    }
    store(l_t + i, all_t);
    store(l_s + i, all_s);
    store(y + i, fma(e_t, sub(u_s, u_t), sums[2]));
    store(inverse_t + i, i_t);
    store(inverse_s + i, i_s);
    F p = mul(e_t, i_t), q = mul(e_s, i_s), difference = sub(q, p);
    excess += sum_lanes(difference);
    F others = sub(mul(maskz(valid, sums[0]), i_t), mul(maskz(valid, sums[1]), i_s));
    difference = select(magnitude_below(q, 0.5f), difference, others);
    store(diagonal + i, add(difference, difference));
  }
  double sum = 0.0;
  Log2Sum logs_t, logs_s;
  for (int64_t i = 0; i < task.length; ++i) {
    if (!counts(task, i)) continue;
    sum += static_cast<double>(y[i]) * inverse_t[i];
    logs_t.add(l_t[i]);
    logs_s.add(l_s[i]);
  }
  sum -= logs_s.value() - logs_t.value();
  task.kl[task.slices] = excess - 0.693147180559945309 * sum;
}

// grads[i] += 2 (q_ii - p_ii) x_i
void diagonal_gradient(const Task& task, float* grads) {
  int64_t tokens = task.blocks * V;
  for_each_chunk(task.student.width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    for (int64_t i = 0; i < tokens; i += C::kTokens) {
      const float* at = task.student.norms + i;
      F factor = C::kHalf ? set1_pair(at) : set1(*at);
      for (int n = 0; n < C::kVectors; ++n) {
        int64_t to = d * tokens + i * C::kFeatures + n * V;
        store(grads + to, fma(factor, load(task.student.key_tokens + to), load(grads + to)));
      }
    }
  });
}

// Computes the score gradients m = E_s (1/l_s,i + 1/l_s,j) - E_t (1/l_t,i + 1/l_t,j) = q_ij + q_ji - p_ij - p_ji of one
// key block, and returns their sum in each lane. in_t, in_s: cached exponentials of phase 1, or scores. The teacher's
// factors (column_t, rows_t) are negative.
template <bool kFull, bool kCached>
MINILM_INLINE F score_grad_of_block(const float* in_t, const float* in_s, const PairMask* pairs, const float* rows_t,
                                    const float* rows_s, F column_t, F column_s, float* m) {
  F total = set1(0.0f);
  for (int r = 0; r < R; ++r) {
    F f_t = column_t, f_s = column_s;
    F e_t = load(in_t + r * V), e_s = load(in_s + r * V);
    if (!kCached) {
      e_t = exp2_fast(e_t);
      e_s = exp2_fast(e_s);
    }
    if (!kFull) {
      if (!kCached) {
        e_t = maskz(pairs->visible[r], e_t);
        e_s = maskz(pairs->visible[r], e_s);
      }
      f_t = maskz(pairs->mirrored[r], f_t);
      f_s = maskz(pairs->mirrored[r], f_s);
    }
    f_t = add(f_t, set1(rows_t[r]));
    f_s = add(f_s, set1(rows_s[r]));
    F x = fma(e_t, f_t, mul(e_s, f_s));
    store(m + r * V, x);
    total = add(total, x);
  }
  return total;
}

template <bool kCached>
MINILM_INLINE F score_grad_of_panel(const Task& task, int64_t first, int64_t block, int64_t blocks, const float* in_t,
                                    const float* in_s, int64_t step, const float* rows_t, const float* rows_s,
                                    float* m) {
  const float *inverse_t = task.inverse, *inverse_s = task.inverse + task.blocks * V;
  F total = set1(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F column_t = sub(set1(0.0f), load(inverse_t + (block + b) * V)), column_s = load(inverse_s + (block + b) * V);
    const float *t = in_t + b * step, *s = in_s + b * step;
    float* out = m + b * R * V;
    if (is_full(task, first, block + b)) {
      total = add(total, score_grad_of_block<true, kCached>(t, s, nullptr, rows_t, rows_s, column_t, column_s, out));
    } else {
      PairMask pairs = pair_mask(task, first, block + b);
      total = add(total, score_grad_of_block<false, kCached>(t, s, &pairs, rows_t, rows_s, column_t, column_s, out));
    }
  }
  return total;
}

void symmetric_gradient(const Task& task, int64_t slice, float* scratch) {
  int64_t padded = task.blocks * V, size = padded * token_floats(task.student.width);
  const float *inverse_t = task.inverse, *inverse_s = task.inverse + padded;
  float* total = task.student.key_grads + slice * size;
  TwoStepSum grads(task.student.recent_grads + slice * size, total, size / V);
  if (slice == 0) diagonal_gradient(task, total);
  float *m = scratch, *u_s = m + kPanelBlocks * R * V;
  double excess = 0.0;
  ExpCache exp_cache = exp_cache_of(task, slice);
  for (int64_t first = last_row_block(task, slice); first >= 0; first -= task.slices * R) {
    float rows_t[R], rows_s[R];
    for (int r = 0; r < R; ++r) {
      bool valid = first + r < task.length;
      rows_t[r] = valid ? -inverse_t[first + r] : 0.0f;
      rows_s[r] = valid ? inverse_s[first + r] : 0.0f;
    }
    F sum = set1(0.0f);
    int64_t end = key_blocks(first);
    const float* exponentials = nullptr;
    if (first >= exp_cache.from) exponentials = exp_cache.end -= cached_floats(first);
    for (int64_t block = 0; block < end; block += kPanelBlocks) {
      int64_t blocks = end - block < kPanelBlocks ? end - block : kPanelBlocks;
      F part;
      if (exponentials) {
        part = score_grad_of_panel<true>(task, first, block, blocks, exponentials, exponentials + R * V, 2 * R * V,
                                         rows_t, rows_s, m);
        exponentials += blocks * 2 * R * V;
      } else {
        panel_scores(task, first, block, blocks, m, u_s);
        part = score_grad_of_panel<false>(task, first, block, blocks, m, u_s, R * V, rows_t, rows_s, m);
      }
      sum = add(sum, part);
      gradients(m, task, first, block, blocks, grads.recent(), grads.recent());
    }
    excess += sum_lanes(sum);
    grads.end_row_block(first == slice * R);
  }
  task.kl[slice] = excess;
}

}  // namespace
