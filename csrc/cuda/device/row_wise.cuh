// The row-wise path, with a running maximum per row, for every call that the symmetric path does not support:
// cross relations, reduction "none" and its gradient, losses without gradient, negative scales, and sequences that
// exceed shared memory.
//
// A warp owns 32 tokens, its own tokens, and loops over tiles of the other tokens, those that form pairs with them. If
// the own tokens are rows, the other tokens are keys, and vice versa. The first kernel computes the log-sum-exp of each
// row. The second kernel recomputes the scores and computes the KL divergence and the gradient of the own tokens. A
// cross relation launches the second kernel twice, the second time with the keys as own tokens. No two warps write to
// the same memory, and the scratch memory is O(S).
#pragma once

#include "segment_parts.cuh"

namespace minilm::cuda {

// 2^x. With kExact, it is computed by a polynomial, with an error of about one unit in the last place; otherwise by
// ex2.approx, with an error of two units.
template <bool kExact>
MINILM_DEVICE float exp2_of(float x) {
  if (!kExact) return exp2_fast(x);
  const float shift = 0x1.8p23f + 127.0f;
  float shifted = add(fminf(fmaxf(x, -126.0f), 127.0f), shift);
  float r = sub(x, sub(shifted, shift));
  float p = fmaf(kExp2C6, r, kExp2C5);
  p = fmaf(p, r, kExp2C4);
  p = fmaf(p, r, kExp2C3);
  p = fmaf(p, r, kExp2C2);
  p = fmaf(p, r, kExp2C1);
  p = fmaf(p, r, 1.0f);
  return x < -126.0f ? 0.0f : p * as_float(as_bits(shifted) << 23);
}

// log2 Σ 2^u of each row, as max + log2_sum. With kExact, max is the largest u and is stored separately. The
// differences u - max of the large exponentials are then small, and a row that sees a single key gets p = 1 exactly.
// Without kExact, max is 0 and is not stored.
struct RowStats {
  float *log2_sum_t, *log2_sum_s, *max_t, *max_s;
};

// The own tokens or the other tokens of a tile, with their row statistics and weights.
struct TileOperands {
  Tokens teacher, student;
  RowStats rows;
  const float* weights;  // row weights of the gradient; null: all 1
};
MINILM_DEVICE TileOperands at(const TileOperands& x, int token) {
  const RowStats& rows = x.rows;
  return {at(x.teacher, token),
          at(x.student, token),
          {rows.log2_sum_t + token, rows.log2_sum_s + token, rows.max_t + token, rows.max_s + token},
          x.weights ? x.weights + token : nullptr};
}

// The first own token and the first other token of a tile.
struct TileOrigin {
  int own, other;
};

// A value for each of the 4 rows (own tokens) that a lane holds: [m][e / 2].
using PerRow = float[2][2];

// Updates the running maxima, and the sums of 2^(u - maximum), with a tile of scores. Each lane handles the columns
// that it holds.
template <bool kExact>
MINILM_DEVICE void add_row_stats(PerRow& maximum, PerRow& total, const float (&score)[2][4][4], float scale,
                                 const Sequence& sequence, TileOrigin origin) {
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int half = 0; half < 2; ++half) {
      int visible = bound_of(sequence, origin.own + own_row(m, half)) - origin.other;
      float max = maximum[m][half];
      MINILM_UNROLL_FOR (int n = 0; n < 4; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 2; ++e)
          if (other_column(n, e) < visible) max = fmaxf(max, mul(score[m][n][2 * half + e], scale));
      float sum = total[m][half] * exp2_of<kExact>(maximum[m][half] - max);
      MINILM_UNROLL_FOR (int n = 0; n < 4; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 2; ++e) {
          float x = exp2_of<kExact>(sub(mul(score[m][n][2 * half + e], scale), max));
          sum += other_column(n, e) < visible ? x : 0.0f;
        }
      maximum[m][half] = max;
      total[m][half] = sum;
    }
}

// Combines the four lanes of each row and writes log2 Σ 2^u of the warp's own rows below `end`. Row 0 is row `first` of
// the sequence. Rows that do not count get a finite number in place of ∞, so that p, q and their KL divergence are 0.
template <bool kExact>
MINILM_DEVICE void write_row_stats(float* log2_sum, float* row_max, const PerRow& maximum, const PerRow& total,
                                   const Sequence& sequence, int first, int end) {
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int half = 0; half < 2; ++half) {
      float max = maximum[m][half], sum = total[m][half];
      MINILM_UNROLL_FOR (int mask = 1; mask <= 2; mask *= 2) {
        float other = shuffle_xor(max, mask), other_sum = shuffle_xor(sum, mask);
        float next = fmaxf(max, other);
        sum = sum * exp2_of<kExact>(max - next) + other_sum * exp2_of<kExact>(other - next);
        max = next;
      }
      const int row = own_row(m, half);
      if (lane_index() % 4 == 0 && row < end) {
        log2_sum[row] = !counts(sequence, first + row) ? -kNegInf : kExact ? log2f(sum) : max + log2f(sum);
        if (kExact) row_max[row] = max;
      }
    }
}

// p (e^δ - 1 - δ) with δ = log q - log p, which is given in units of log 2. The result is never negative, and its terms
// do not cancel for small δ.
MINILM_DEVICE float exact_term(float p, float q, float bits) {
  float delta = bits * kLn2;
  float series = 1.9841270e-4f;  // 1/7!, 1/6!, ...
  series = fmaf(series, delta, 1.3888889e-3f);
  series = fmaf(series, delta, 8.3333333e-3f);
  series = fmaf(series, delta, 4.1666667e-2f);
  series = fmaf(series, delta, 1.6666667e-1f);
  series = fmaf(series, delta, 0.5f);
  float small = p * delta * delta * series;
  float large = fmaf(-p, delta, q - p);
  return fabsf(delta) < 0.25f ? small : large;
}

template <bool kExact>
MINILM_DEVICE float log2_of(float score, float scale, float log2_sum, const float* max) {
  return kExact ? sub(sub(mul(score, scale), *max), log2_sum) : fmaf(score, scale, -log2_sum);
}

// Replaces the student's scores of half a tile by score gradients. kForward: the own tokens are rows, and their KL
// divergence is added to kl. kBackward: the own tokens are keys, and the other tokens are rows. With both, score
// gradients of keys are added to key_grads.
template <bool kExact, bool kForward, bool kBackward>
MINILM_DEVICE void add_score_grads(const float (&score_t)[2][2][4], float (&score_s)[2][2][4], float scale_t,
                                   float scale_s, const Sequence& sequence, TileOrigin origin, const TileOperands& own,
                                   const TileOperands& other, bool weighted, PerRow& kl, PerRow& key_grads) {
  MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
    MINILM_UNROLL_FOR (int c = 0; c < 2; ++c) {
      const int column = other_column(n, c);
      float other_t = 0.0f, other_s = 0.0f, max_t = 0.0f, max_s = 0.0f, other_weight = 1.0f;
      int visible_to_other = 0;
      if (kBackward) {
        other_t = other.rows.log2_sum_t[column];
        other_s = other.rows.log2_sum_s[column];
        if (kExact) {
          max_t = other.rows.max_t[column];
          max_s = other.rows.max_s[column];
        }
        if (weighted || other.weights) other_weight = other.weights[column];
        visible_to_other = bound_of(sequence, origin.other + column) - origin.own;
      }
      MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
        MINILM_UNROLL_FOR (int half = 0; half < 2; ++half) {
          const int row = own_row(m, half), e = 2 * half + c;
          const float x_t = score_t[m][n][e], x_s = score_s[m][n][e];
          float grad = 0.0f;
          // static: begin forward
          if (kForward) {
            float log_p = log2_of<kExact>(x_t, scale_t, own.rows.log2_sum_t[row], own.rows.max_t + row);
            float log_q = log2_of<kExact>(x_s, scale_s, own.rows.log2_sum_s[row], own.rows.max_s + row);
            float p = exp2_of<kExact>(log_p), q = exp2_of<kExact>(log_q);
            bool visible = origin.other + column < bound_of(sequence, origin.own + row);
            kl[m][half] += visible ? exact_term(p, q, log_q - log_p) : 0.0f;
            float weight = weighted || own.weights ? own.weights[row] : 1.0f;
            grad = visible ? weight * (q - p) : 0.0f;
          }
          // static: end forward
          // static: begin backward
          if (kBackward) {
            float p = exp2_of<kExact>(log2_of<kExact>(x_t, scale_t, other_t, &max_t));
            float q = exp2_of<kExact>(log2_of<kExact>(x_s, scale_s, other_s, &max_s));
            float key_grad = row < visible_to_other ? other_weight * (q - p) : 0.0f;
            if (kForward) key_grads[m][half] += key_grad;
            grad += key_grad;
          }
          // static: end backward
          score_s[m][n][e] = grad;
        }
    }
}

// Adds one tile's contribution to the KL divergence of the own tokens' rows and, if kFormat > 0, to the gradient of the
// own tokens, times grad_scale(kFormat). key_grads: see add_score_grads.
template <int kFormat, bool kExact, bool kForward, bool kBackward>
MINILM_DEVICE void row_wise_tile(const TileOperands& own, const TileOperands& other, int chunks_t, int format_t,
                                 int chunks_s, int format_s, float scale_t, float scale_s, const Sequence& sequence,
                                 TileOrigin origin, PerRow& kl, float* sums, int plane, PerRow& key_grads) {
  // Row-wise kernels have weights in any case. Without a test, the compiler does not make two copies of the code.
  const bool weighted = kFormat != kFloat32 && splits_in(format_s) == 3;
  MINILM_NO_UNROLL_FOR (int half = 0; half < 2; ++half) {
    const TileOperands columns = at(other, 16 * half);
    float score_t[2][2][4], score_s[2][2][4];
    scores(score_t, own.teacher, columns.teacher, chunks_t, format_t);
    scores(score_s, own.student, columns.student, chunks_s, format_s);
    add_score_grads<kExact, kForward, kBackward>(score_t, score_s, scale_t, scale_s, sequence,
                                                 {origin.own, origin.other + 16 * half}, own, columns, weighted, kl,
                                                 key_grads);
    if constexpr (kFormat > 0)
      add_gradients<kFormat, false>(score_s, sums, nullptr, plane, own.student, columns.student, chunks_s);
  }
}

// ---- Means ------------------------------------------------------------------------------------------------------

// As find_means in tile.cuh. `scratch`: two floats per thread.
MINILM_DEVICE float find_means(const HeadTokens& load, int chunks, float* means, float* scratch) {
  float most = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float sum[8] = {}, squares[8] = {};
    for (int i = thread_index(); i < load.sequence.length; i += thread_count()) {
      float value[8];
      load(i, chunk, value);
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) {
        sum[d] += value[d];
        squares[d] = fmaf(value[d], value[d], squares[d]);
        most = fmaxf(most, fabsf(value[d]));
      }
    }
    scratch[thread_index()] = distributed_sums(sum, 1);  // lane % 8 is the feature
    scratch[thread_count() + thread_index()] = distributed_sums(squares, 1);
    syncthreads();
    if (thread_index() < 8) {
      float total = 0.0f, total_squares = 0.0f;
      for (int i = thread_index(); i < thread_count(); i += 8) {
        total += scratch[i];
        total_squares += scratch[thread_count() + i];
      }
      means[8 * chunk + thread_index()] = useful_mean(total, total_squares, load.sequence.length);
    }
    syncthreads();
  }
  return most;
}

// A constant vector in all keys adds a constant to the scores of a row, which changes no probability: the row-wise
// kernels subtract the mean of a float32 head's keys. The gradient of a query is a sum over keys, in which the constant
// has the factor Σ_j G_ij = 0; that of a key has no keys. If a pass computes both orders of the pairs of a self
// relation, its scores are symmetric: all its tokens are less their mean, and have offsets (format kFloat32). As
// add_means says, the gradient of a token as a key is then incomplete.
struct KeyMeans {
  float *t, *s;    // the teacher's and the student's
  float* scratch;  // two floats per thread

  MINILM_DEVICE const float* operator()(float* means, const TensorView& keys, const Sequence& sequence, int head,
                                        int chunks, int format) const {
    if (splits_in(format) < 3) return nullptr;
    find_means(HeadTokens(keys, sequence, head), chunks, means, scratch);
    return means;
  }
};

// Token j's gradient as a key is Σ_i G_ij x_i. If the tokens are less their mean, μ Σ_i G_ij is missing; this adds it
// to the gradients of a warp's own tokens. Each lane adds to numbers that it has written.
MINILM_DEVICE void add_means(float* grads, int plane, int chunks, const float* means, const PerRow& key_grads) {
  const int feature = lane_index() % 4 * 2;
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int half = 0; half < 2; ++half) {
      float sum = key_grads[m][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float* grad = grads + chunk * plane + own_row(m, half) * 8 + feature;
        const Float2 before = load_float2(grad), mean = load_float2(means + 8 * chunk + feature);
        store_float2(grad, fmaf(sum, mean.x, before.x), fmaf(sum, mean.y, before.y));
      }
    }
}

// ---- Kernels ----------------------------------------------------------------------------------------------------

// Layout of a block's shared memory; row_wise_bytes in launch_plan.h computes its size.
struct RowWiseLayout {
  Tokens own_t, own_s, other_t, other_s;
  RowStats own_rows, other_rows;
  float *grads, *own_weights, *other_weights;
  KeyMeans means;
  double* scratch;
  int own;

  MINILM_DEVICE RowWiseLayout(char* memory, int own_tokens, int streamed, int planes_t, int planes_s, int grad_chunks)
      : own(own_tokens) {
    char* next = memory;
    auto tokens = [&](int count, int planes) {
      Tokens x{next, count * 16};
      next += planes * count * 16;
      return x;
    };
    auto floats = [&](int count) {
      float* x = reinterpret_cast<float*>(next);
      next += count * 4;
      return x;
    };
    own_t = tokens(own, planes_t);
    own_s = tokens(own, planes_s);
    other_t = tokens(streamed, planes_t);
    other_s = tokens(streamed, planes_s);
    grads = floats(grad_chunks * own * 8);
    own_rows = {floats(own), floats(own), floats(own), floats(own)};
    own_weights = floats(own);
    other_rows = {floats(streamed), floats(streamed), floats(streamed), floats(streamed)};
    other_weights = floats(streamed);
    means.t = floats(planes_t / 3 * 8);
    means.s = floats(planes_s / 3 * 8);
    means.scratch = reinterpret_cast<float*>(writable(other_t));
    scratch = reinterpret_cast<double*>(next);
  }
};

// The work of a block: its own tokens are those from token `first` of the sequence on.
struct RowWork {
  const Relation* relation;
  Sequence sequence;
  int64_t n;
  int head;      // query head; if the own tokens are keys, the first query head of their group
  int end_head;  // end of the query heads that the block processes
  int first;
  bool empty;  // no valid token, or none that this launch processes
};

// Sequence n begins at block ⌊start / own⌋ + n. Every sequence thus has at least as many blocks as it needs, and a
// block finds its sequence by a binary search in `starts`, without any other data.
MINILM_DEVICE RowWork find_row_work(const LaunchParams& params, int own, double** partial) {
  const Call& call = params.call;
  int64_t block = block_index();
  RowWork work;
  work.head = static_cast<int>(block % call.num_heads);
  block /= call.num_heads;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  const int64_t blocks = total / own + call.num_sequences;
  work.relation = &params.relations[block / blocks];
  block %= blocks;
  const int heads = params.keys ? work.relation->student.group : 1;
  work.end_head = work.head + heads;
  int64_t low = 0, high = call.num_sequences - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (start_of(call, middle) / own + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  work.n = low;
  bool valid = find_sequence(call, low, work.sequence);
  int64_t first = (block - start_of(call, low) / own - low) * own;
  work.empty = !valid || first < 0 || first >= work.sequence.length || work.sequence.length < params.min_length ||
               work.sequence.length > params.max_length || work.head % heads != 0;
  work.first = first < 0 || first >= call.positions ? 0 : static_cast<int>(first);
  *partial =
      params.partials + work.relation->index * params.slots + params.first_slot + block * call.num_heads + work.head;
  return work;
}

// Offset of the row statistics of a sequence and a query head in scratch memory.
MINILM_DEVICE int64_t first_row_stats(const LaunchParams& params, const RowWork& work, int head) {
  const Call& call = params.call;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  return (work.relation->index * call.num_heads + head) * total + work.sequence.first;
}

MINILM_DEVICE RowStats at(const LaunchParams& params, int64_t row) {
  const int64_t all = params.row_stats_stride;
  float* first = params.row_stats + row;
  return {first, first + all, first + 2 * all, first + 3 * all};
}

// Offset of the rows of a sequence and a query head in (R, N, A, S) or (R, A, T).
MINILM_DEVICE int64_t first_row(const LaunchParams& params, const RowWork& work, int head) {
  const Call& call = params.call;
  const int64_t matrices = call.packed ? 1 : call.num_sequences;
  return ((work.relation->index * matrices + work.sequence.batch) * call.num_heads + head) * call.positions;
}

// Range [first, end) of the other tokens that an own token sees (forward), or whose rows see an own token (backward).
struct TokenRange {
  int first, end;
};
MINILM_DEVICE TokenRange find_streamed(const Sequence& sequence, int first, int own, bool forward, bool backward) {
  int last = min_of(first + own, sequence.length) - 1;
  TokenRange seen{0, bound_of(sequence, last)};
  TokenRange seeing{first < sequence.prefix ? 0 : first / kTile * kTile, sequence.length};
  if (!backward) return seen;
  if (!forward) return seeing;
  return {0, sequence.length};
}

// Chunks and formats of both models' tokens. Template arguments that are 0 (in the emulation) are replaced by the
// values of the call.
template <int kChunksT, int kFormatT, int kChunksS, int kFormatS>
struct Shape {
  int given_chunks_t, given_format_t, given_chunks_s, given_format_s;

  MINILM_DEVICE Shape(const Relation& relation, bool gradient)
      : given_chunks_t(chunks_of(relation.teacher.key.width)),
        given_format_t(row_wise_format(splits_of(relation.teacher), relation.self && gradient)),
        given_chunks_s(chunks_of(relation.student.key.width)),
        given_format_s(row_wise_format(splits_of(relation.student), relation.self && gradient)) {}
  MINILM_DEVICE int chunks_t() const { return kChunksT ? kChunksT : given_chunks_t; }
  MINILM_DEVICE int format_t() const { return kFormatT ? kFormatT : given_format_t; }
  MINILM_DEVICE int chunks_s() const { return kChunksS ? kChunksS : given_chunks_s; }
  MINILM_DEVICE int format_s() const { return kFormatS ? kFormatS : given_format_s; }
};

// kExact: see exp2_of. RowWiseKernel must have the same value.
template <bool kExact, int kChunksT, int kFormatT, int kChunksS, int kFormatS>
struct RowStatsKernel {
  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    const int own = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const RowWork work = find_row_work(params, own, &partial);
    if (work.empty) return;
    const Sequence& sequence = work.sequence;
    const Relation& relation = *work.relation;
    if (params.segments.window) {
      const HeadScratch scratch(params, relation, work.n, sequence, work.head);
      if (scratch.range->shared) return finish_sums(params, sequence, scratch, work.first);
    }
    const Shape<kChunksT, kFormatT, kChunksS, kFormatS> shape(relation, params.call.gradient);
    const int chunks_t = shape.chunks_t(), format_t = shape.format_t();
    const int chunks_s = shape.chunks_s(), format_s = shape.format_s();
    const RowWiseLayout shared(memory, own, params.capacity, score_planes(format_t, chunks_t),
                               score_planes(format_s, chunks_s), 0);
    const int head = work.head, key_head_t = head / relation.teacher.group, key_head_s = head / relation.student.group;
    const float* means_t = shared.means(shared.means.t, relation.teacher.key, sequence, key_head_t, chunks_t, format_t);
    const float* means_s = shared.means(shared.means.s, relation.student.key, sequence, key_head_s, chunks_s, format_s);
    load_tokens(relation.teacher.query, sequence, head, work.first, own, shared.own_t, chunks_t, format_t,
                !relation.self, format_t == kFloat32 ? means_t : nullptr);
    load_tokens(relation.student.query, sequence, head, work.first, own, shared.own_s, chunks_s, format_s,
                !relation.self, format_s == kFloat32 ? means_s : nullptr);
    const TokenRange streamed = find_streamed(sequence, work.first, own, true, false);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;

    PerRow max_t, max_s, total_t, total_s;
    MINILM_UNROLL_FOR (int i = 0; i < 4; ++i) {
      max_t[i / 2][i % 2] = max_s[i / 2][i % 2] = kNegInf;
      total_t[i / 2][i % 2] = total_s[i / 2][i % 2] = 0.0f;
    }
    MINILM_NO_UNROLL_FOR (int first = streamed.first; first < streamed.end; first += params.capacity) {
      syncthreads();
      load_tokens(relation.teacher.key, sequence, key_head_t, first, params.capacity, shared.other_t, chunks_t,
                  format_t, false, means_t);
      load_tokens(relation.student.key, sequence, key_head_s, first, params.capacity, shared.other_s, chunks_s,
                  format_s, false, means_s);
      syncthreads();
      MINILM_NO_UNROLL_FOR (int tile = 0; tile < params.capacity; tile += kTile) {
        const TileOrigin origin{work.first + warp, first + tile};
        float score[2][4][4];
        scores(score, at(shared.own_t, warp), at(shared.other_t, tile), chunks_t, format_t);
        add_row_stats<kExact>(max_t, total_t, score, scale_t, sequence, origin);
        scores(score, at(shared.own_s, warp), at(shared.other_s, tile), chunks_s, format_s);
        add_row_stats<kExact>(max_s, total_s, score, scale_s, sequence, origin);
      }
    }
    const RowStats out = at(params, first_row_stats(params, work, head) + work.first + warp);
    const int first = work.first + warp, end = sequence.length - first;
    write_row_stats<kExact>(out.log2_sum_t, out.max_t, max_t, total_t, sequence, first, end);
    write_row_stats<kExact>(out.log2_sum_s, out.max_s, max_s, total_s, sequence, first, end);
  }
};

// The own tokens are rows (1), keys (2) or both (3).
template <int kDirection>
struct Direction {
  static constexpr int value = kDirection;
};

// kSplits: splits of the student's tokens and of the score gradients; 0: no gradient.
template <int kSplits, int kChunksT, int kFormatT, int kChunksS, int kFormatS>
struct RowWiseKernel {
  static constexpr bool kExact = kSplits == 0 || kSplits == 3;

  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    const Call& call = params.call;
    const int own_tokens = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const RowWork work = find_row_work(params, own_tokens, &partial);
    const Relation& relation = *work.relation;
    if (kSplits) clear_padding(params, work, own_tokens);
    if (work.empty) {
      if (thread_index() == 0 && call.values && !params.keys) *partial = 0.0;
      return;
    }
    const Sequence& sequence = work.sequence;
    if (kSplits && params.segments.window) {
      const HeadScratch scratch(params, relation, work.n, sequence, work.head);
      if (scratch.range->shared) return finish(params, work, scratch, memory, partial);
    }
    const bool forward = has_offsets() || !params.keys, backward = kSplits > 0 && (params.keys || is_self(relation));
    const TensorView& own_x_t = params.keys ? relation.teacher.key : relation.teacher.query;
    const TensorView& own_x_s = params.keys ? relation.student.key : relation.student.query;
    const TensorView& other_x_t = params.keys ? relation.teacher.query : relation.teacher.key;
    const TensorView& other_x_s = params.keys ? relation.student.query : relation.student.key;
    const Shape<kChunksT, kFormatT, kChunksS, kFormatS> shape(relation, kSplits > 0);
    const int chunks_t = shape.chunks_t(), format_t = shape.format_t();
    const int chunks_s = shape.chunks_s(), format_s = shape.format_s();
    const RowWiseLayout shared(memory, own_tokens, params.capacity, score_planes(format_t, chunks_t),
                               score_planes(format_s, chunks_s), kSplits ? chunks_s : 0);
    if (kSplits)
      for (int i = thread_index(); i < chunks_s * own_tokens * 8; i += thread_count()) shared.grads[i] = 0.0f;
    const TokenRange streamed = find_streamed(sequence, work.first, own_tokens, forward, backward);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;
    const TileOperands own = at(TileOperands{shared.own_t, shared.own_s, shared.own_rows, shared.own_weights}, warp);
    const TileOperands all{shared.other_t, shared.other_s, shared.other_rows, shared.other_weights};

    PerRow kl = {}, key_grads = {};
    const float *means_t = nullptr, *means_s = nullptr;
    MINILM_NO_UNROLL_FOR (int head = work.head, first = streamed.first; head < work.end_head;) {
      const int key_head_t = head / relation.teacher.group, key_head_s = head / relation.student.group;
      const int64_t row_stats_at = first_row_stats(params, work, head), row_at = first_row(params, work, head);
      syncthreads();
      if (first == streamed.first) {
        means_t = shared.means(shared.means.t, relation.teacher.key, sequence, key_head_t, chunks_t, format_t);
        means_s = shared.means(shared.means.s, relation.student.key, sequence, key_head_s, chunks_s, format_s);
        load_tokens(own_x_t, sequence, forward ? head : key_head_t, work.first, own_tokens, shared.own_t, chunks_t,
                    format_t, forward && !is_self(relation), forward && format_t != kFloat32 ? nullptr : means_t);
        load_tokens(own_x_s, sequence, forward ? head : key_head_s, work.first, own_tokens, shared.own_s, chunks_s,
                    format_s, forward && !is_self(relation), forward && format_s != kFloat32 ? nullptr : means_s);
        load_row_stats(params, sequence, row_stats_at, row_at, work.first, own_tokens, shared.own_rows,
                       shared.own_weights);
      }
      load_tokens(other_x_t, sequence, forward ? key_head_t : head, first, params.capacity, shared.other_t, chunks_t,
                  format_t, !forward, forward ? means_t : nullptr);
      load_tokens(other_x_s, sequence, forward ? key_head_s : head, first, params.capacity, shared.other_s, chunks_s,
                  format_s, !forward, forward ? means_s : nullptr);
      load_row_stats(params, sequence, row_stats_at, row_at, first, params.capacity, shared.other_rows,
                     shared.other_weights);
      syncthreads();
      MINILM_NO_UNROLL_FOR (int tile = 0; tile < params.capacity; tile += kTile) {
        const TileOrigin origin{work.first + warp, first + tile};
        const TileOperands other = at(all, tile);
        float* sums = shared.grads + warp * 8;
        auto process = [&](auto direction) {
          row_wise_tile<kSplits, kExact, (direction.value != 2), (direction.value != 1)>(
              own, other, chunks_t, format_t, chunks_s, format_s, scale_t, scale_s, sequence, origin, kl, sums,
              own_tokens * 8, key_grads);
        };
        if (kSplits == 0 || !backward)
          process(Direction<1>{});
        else if (forward)
          process(Direction<kSplits ? 3 : 1>{});
        else
          process(Direction<kSplits ? 2 : 1>{});
      }
      first += params.capacity;
      if (first >= streamed.end) {
        first = streamed.first;
        ++head;
      }
    }

    if (forward) write_rows(params, work, kl, warp, shared.scratch, partial);
    if (kSplits == 3 && format_s == kFloat32)
      add_means(shared.grads + warp * 8, own_tokens * 8, chunks_s, means_s, key_grads);
    if (kSplits) {
      syncthreads();
      write_gradient(params, work, own_x_s.width, chunks_s, shared);
    }
  }

  // Kernels with gradient and float32 tokens are for self relations, which have offsets, or for cross relations.
  static constexpr bool has_offsets() { return kFormatT == kFloat32 || kFormatS == kFloat32; }
  static MINILM_DEVICE bool is_self(const Relation& relation) {
    if (has_offsets()) return true;
    return (kSplits == 0 || (kFormatT != 3 && kFormatS != 3)) && relation.self;
  }

  // Completes the own tokens of a head that the segment kernel has computed.
  static MINILM_DEVICE void finish(const LaunchParams& params, const RowWork& work, const HeadScratch& scratch,
                                   char* memory, double* partial) {
    const Relation& relation = *work.relation;
    const int width = relation.student.key.width;
    const float weight = weight_of(params.call, work.n);
    const float value = finish_gradient(params, work.sequence, scratch, work.first, gradient_of(params, work, 1), width,
                                        relation.student.scale * weight);
    const double sum = block_sum(value, reinterpret_cast<double*>(memory));
    if (thread_index() == 0) *partial = weight * sum;
  }

  // Gradient of the sequence's first position and the block's head, if `group` heads share one.
  static MINILM_DEVICE float* gradient_of(const LaunchParams& params, const RowWork& work, int group) {
    const Relation& relation = *work.relation;
    return (params.keys ? relation.key_grad : relation.query_grad) +
           (work.sequence.batch * params.call.positions * (params.call.num_heads / group) + work.head / group) *
               relation.student.key.width;
  }

  static MINILM_DEVICE void load_row_stats(const LaunchParams& params, const Sequence& sequence, int64_t row_stats_at,
                                           int64_t row_at, int first, int count, const RowStats& rows, float* weights) {
    const float* given = params.call.row_grads;
    const RowStats from = at(params, row_stats_at + first);
    for (int i = thread_index(); i < count; i += thread_count()) {
      const bool valid = first + i < sequence.length;
      rows.log2_sum_t[i] = valid ? from.log2_sum_t[i] : 0.0f;
      rows.log2_sum_s[i] = valid ? from.log2_sum_s[i] : 0.0f;
      if (kExact) {
        rows.max_t[i] = valid ? from.max_t[i] : 0.0f;
        rows.max_s[i] = valid ? from.max_s[i] : 0.0f;
      }
      weights[i] = !counts(sequence, first + i) ? 0.0f
                   : given                      ? given[row_at + position_of(sequence, first + i)]
                                                : 1.0f;
    }
  }

  static MINILM_DEVICE void write_rows(const LaunchParams& params, const RowWork& work, PerRow& kl, int warp,
                                       double* scratch, double* partial) {
    const Call& call = params.call;
    const int64_t row_at = first_row(params, work, work.head);
    double value = 0.0;
    MINILM_UNROLL_FOR (int i = 0; i < 4; ++i) {
      float row = kl[i / 2][i % 2];
      row += shuffle_xor(row, 1);
      row += shuffle_xor(row, 2);
      row = row < 0.0f ? 0.0f : row;
      const int token = work.first + warp + own_row(i / 2, i % 2);
      if (lane_index() % 4 == 0 && token < work.sequence.length) {
        if (call.row_values)
          call.row_values[row_at + position_of(work.sequence, token)] = row * weight_of(call, work.n);
        value += row;
      }
    }
    if (call.values) {
      value = block_sum(value, scratch);
      if (thread_index() == 0) *partial = weight_of(call, work.n) * value;
    }
  }

  static MINILM_DEVICE void clear_padding(const LaunchParams& params, const RowWork& work, int own) {
    const int group = params.keys ? work.relation->student.group : 1, width = work.relation->student.key.width;
    if (work.head % group == 0)
      cuda::clear_padding(params.call, work.n, work.first, work.first + own, gradient_of(params, work, group),
                          params.call.num_heads / group * width, width);
  }

  static MINILM_DEVICE void write_gradient(const LaunchParams& params, const RowWork& work, int width, int chunks,
                                           const RowWiseLayout& shared) {
    const Call& call = params.call;
    const Relation& relation = *work.relation;
    const float factor = relation.student.scale * weight_of(call, work.n);
    const int group = params.keys ? relation.student.group : 1;
    const int64_t heads = call.num_heads / group;
    float* out = gradient_of(params, work, group);
    for (int item = thread_index(); item < shared.own * chunks; item += thread_count()) {
      const int slot = item / chunks, chunk = item % chunks;
      if (work.first + slot < work.sequence.length)
        write_chunk(out + position_of(work.sequence, work.first + slot) * heads * width, width, chunk,
                    shared.grads + (chunk * shared.own + slot) * 8, factor);
    }
  }
};

// Adds up the partial sums of all blocks, and the relations if their weighted sum is wanted. One block per relation, or
// one block. Losses are NaN if cu_seqlens is malformed, which makes the weights NaN (sequences.cuh).
struct ReduceKernel {
  static MINILM_DEVICE void run(const ReduceParams& reduction, char* memory) {
    const Call& call = reduction.call;
    double* scratch = reinterpret_cast<double*>(memory);
    if (!reduction.weighted) {
      const int r = static_cast<int>(block_index());
      const float value = value_of(reduction, r, scratch);
      if (thread_index() == 0) call.values[reduction.index[r]] = value;
      return;
    }
    float total = 0.0f;
    for (int r = 0; r < reduction.num_relations; ++r) {
      const float value = mul(reduction.weight[r], value_of(reduction, r, scratch));
      total = r == 0 ? value : add(total, value);
    }
    if (thread_index() == 0) *call.values = reduction.accumulates ? add(*call.values, total) : total;
  }

  static MINILM_DEVICE float value_of(const ReduceParams& reduction, int r, double* scratch) {
    const Call& call = reduction.call;
    const double* partials = reduction.partials + reduction.index[r] * reduction.slots;
    double value = 0.0;
    for (int64_t i = reduction.first[r] + thread_index(); i < reduction.end[r]; i += thread_count())
      value += partials[i];
    value = block_sum(value, scratch);
    if (value < 0.0) value = 0.0;  // rounding errors of blocks have either sign: only their sum may be clamped
    const bool malformed = call.num_sequences > 0 && !(weight_of(call, 0) == weight_of(call, 0));
    return malformed ? as_float(0x7fc00000u) : static_cast<float>(value);
  }
};

}  // namespace minilm::cuda
