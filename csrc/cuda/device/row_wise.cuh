// Row by row with running maxima: for everything that unordered pairs do not serve. First the log-sum-exps of a warp's
// own rows, then, with the scores again, KL and excess. See docs/cuda.md.
#pragma once

#include "tile.cuh"

namespace minilm::cuda {

constexpr float kNegInf = -1e30f;  // the maximum of no score

// 2^x. Exact: rounded to about one unit, by a minimax polynomial of 2^r for |r| ≤ 1/2; otherwise ex2.approx, two units.
template <bool kExact>
MINILM_DEVICE float exp2_of(float x) {
  if (!kExact) return exp2_fast(x);
  const float shift = 0x1.8p23f + 127.0f;
  float shifted = add(fminf(fmaxf(x, -126.0f), 127.0f), shift);
  float r = sub(x, sub(shifted, shift));
  float p = fmaf(1.53533619e-4f, r, 1.33988744e-3f);
  p = fmaf(p, r, 9.61843736e-3f);
  p = fmaf(p, r, 5.55033247e-2f);
  p = fmaf(p, r, 2.40226479e-1f);
  p = fmaf(p, r, 6.93147203e-1f);
  p = fmaf(p, r, 1.0f);
  return x < -126.0f ? 0.0f : p * as_float(as_bits(shifted) << 23);
}

// log2 Σ 2^u of a row is most + rest. Exact visits keep the two apart, most being the largest u: the difference u − most
// is rounded where it is small, and a row that sees one key has p = 1. Otherwise most is 0 and not kept.
struct RowStats {
  float *log2_sum_t, *log2_sum_s, *max_t, *max_s;
};

// Tokens of one side of the pairs, as a visit sees them; the arrays run beside the tokens.
struct TileOperands {
  Tokens teacher, student;
  RowStats rows;
  const float* weights;  // of the rows in the gradient; null: 1
};
MINILM_DEVICE TileOperands at(const TileOperands& x, int token) {
  const RowStats& rows = x.rows;
  return {at(x.teacher, token), at(x.student, token),
          {rows.log2_sum_t + token, rows.log2_sum_s + token, rows.max_t + token, rows.max_s + token},
          x.weights ? x.weights + token : nullptr};
}

// Where a tile lies in the sequence, and what its pairs see.
struct TileOrigin {
  int own, other;  // first tokens
};

// Of the 4 own rows that a lane holds: [m][e / 2].
using PerRow = float[2][2];

MINILM_DEVICE int own_row(int m, int half) { return 16 * m + 8 * half + lane_index() / 4; }
MINILM_DEVICE int other_column(int n, int e) { return 8 * n + lane_index() % 4 * 2 + e % 2; }

// Scores of a tile join the running maxima and sums of 2^(u − maximum), each lane for its own columns.
template <bool kExact>
MINILM_DEVICE void add_row_stats(PerRow& maximum, PerRow& total, const float (&score)[2][4][4], float scale,
                                  const Sequence& sequence, TileOrigin origin) {
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int half = 0; half < 2; ++half) {
      int visible = bound_of(sequence, origin.own + own_row(m, half)) - origin.other;
      float most = maximum[m][half];
      MINILM_UNROLL for (int n = 0; n < 4; ++n)
        MINILM_UNROLL for (int e = 0; e < 2; ++e)
          if (other_column(n, e) < visible) most = fmaxf(most, mul(score[m][n][2 * half + e], scale));
      float sum = total[m][half] * exp2_of<kExact>(maximum[m][half] - most);
      MINILM_UNROLL for (int n = 0; n < 4; ++n)
        MINILM_UNROLL for (int e = 0; e < 2; ++e) {
          float x = exp2_of<kExact>(sub(mul(score[m][n][2 * half + e], scale), most));
          sum += other_column(n, e) < visible ? x : 0.0f;
        }
      maximum[m][half] = most;
      total[m][half] = sum;
    }
}

// Joins the four lanes of a row and writes log2 Σ 2^u of the warp's own rows, those below `end`.
template <bool kExact>
MINILM_DEVICE void write_row_stats(float* rest, float* at_most, const PerRow& maximum, const PerRow& total, int end) {
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int half = 0; half < 2; ++half) {
      float most = maximum[m][half], sum = total[m][half];
      MINILM_UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
        float other = shuffle_xor(most, mask), other_sum = shuffle_xor(sum, mask);
        float next = fmaxf(most, other);
        sum = sum * exp2_of<kExact>(most - next) + other_sum * exp2_of<kExact>(other - next);
        most = next;
      }
      const int row = own_row(m, half);
      if (lane_index() % 4 == 0 && row < end) {
        rest[row] = kExact ? log2f(sum) : most + log2f(sum);
        if (kExact) at_most[row] = most;
      }
    }
}

// p (e^δ − 1 − δ) for δ = log q − log p in units of log 2: never negative, and without cancellation where δ is small.
MINILM_DEVICE float exact_term(float p, float q, float bits) {
  float delta = bits * kLn2;
  float series = 1.9841270e-4f;  // 1/7!, 1/6!, …
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
MINILM_DEVICE float log2_of(float score, float scale, float rest, const float* most) {
  return kExact ? sub(sub(mul(score, scale), *most), rest) : fmaf(score, scale, -rest);
}

// Turns half a tile of scores into what it adds to M; M takes the student's place. Forward: the own tokens are rows, whose KL
// is added up as well; backward: they are keys, and the other tokens' rows see them.
template <bool kExact, bool kForward, bool kBackward>
MINILM_DEVICE void add_score_grads(const float (&score_t)[2][2][4], float (&score_s)[2][2][4], float scale_t, float scale_s,
                              const Sequence& sequence, TileOrigin origin, const TileOperands& own, const TileOperands& other, PerRow& kl) {
  MINILM_UNROLL for (int n = 0; n < 2; ++n)
    MINILM_UNROLL for (int c = 0; c < 2; ++c) {
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
        if (other.weights) other_weight = other.weights[column];
        visible_to_other = bound_of(sequence, origin.other + column) - origin.own;
      }
      MINILM_UNROLL for (int m = 0; m < 2; ++m)
        MINILM_UNROLL for (int half = 0; half < 2; ++half) {
          const int row = own_row(m, half), e = 2 * half + c;
          const float x_t = score_t[m][n][e], x_s = score_s[m][n][e];
          float total_grad = 0.0f;
          if (kForward) {
            float log_p = log2_of<kExact>(x_t, scale_t, own.rows.log2_sum_t[row], own.rows.max_t + row);
            float log_q = log2_of<kExact>(x_s, scale_s, own.rows.log2_sum_s[row], own.rows.max_s + row);
            float p = exp2_of<kExact>(log_p), q = exp2_of<kExact>(log_q);
            bool visible = origin.other + column < bound_of(sequence, origin.own + row);
            kl[m][half] += visible ? exact_term(p, q, log_q - log_p) : 0.0f;
            float weight = own.weights ? own.weights[row] : 1.0f;
            total_grad = visible ? weight * (q - p) : 0.0f;
          }
          if (kBackward) {
            float p = exp2_of<kExact>(log2_of<kExact>(x_t, scale_t, other_t, &max_t));
            float q = exp2_of<kExact>(log2_of<kExact>(x_s, scale_s, other_s, &max_s));
            total_grad += row < visible_to_other ? other_weight * (q - p) : 0.0f;
          }
          score_s[m][n][e] = total_grad;
        }
    }
}

// A tile of own and other tokens: KL of the own rows and, with kPieces, what the tile adds to the own tokens' gradient.
template <int kSplits, bool kExact, bool kForward, bool kBackward>
MINILM_DEVICE void row_wise_tile(const TileOperands& own, const TileOperands& other, int chunks_t, int splits_t, int chunks_s, int splits_s,
                              float scale_t, float scale_s, const Sequence& sequence, TileOrigin origin, PerRow& kl,
                              float* sums, int plane) {
  MINILM_NO_UNROLL for (int half = 0; half < 2; ++half) {
    const TileOperands columns = at(other, 16 * half);
    float score_t[2][2][4], score_s[2][2][4];
    scores(score_t, own.teacher, columns.teacher, chunks_t, splits_t);
    scores(score_s, own.student, columns.student, chunks_s, splits_s);
    add_score_grads<kExact, kForward, kBackward>(score_t, score_s, scale_t, scale_s, sequence, {origin.own, origin.other + 16 * half},
                                    own, columns, kl);
    if constexpr (kSplits > 0)
      add_gradients<kSplits, false>(score_s, sums, nullptr, plane, own.student, columns.student, chunks_s);
  }
}

// ---- Kernels ----------------------------------------------------------------------------------------------------

// Shared memory of a block; `rows_bytes` in plan.h is its size.
struct RowWiseLayout {
  Tokens own_t, own_s, other_t, other_s;
  RowStats own_rows, other_rows;
  float *grads, *own_weights, *other_weights;
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
    scratch = reinterpret_cast<double*>(next);
  }
};

// What a block works on: `own` tokens from the sequence's token `first` on.
struct RowWork {
  const Relation* relation;
  Sequence sequence;
  int64_t n, head;
  int first;
  bool empty;
};

// Blocks are counted as if sequence n began at block ⌊starts[n] / own⌋ + n: that leaves it as many as it can need, and
// nothing but `starts` has to be known to find a block's sequence.
MINILM_DEVICE RowWork find_row_work(const LaunchParams& params, int own, double** partial) {
  const Call& call = params.call;
  int64_t block = block_index();
  RowWork task;
  task.head = block % call.num_heads;
  block /= call.num_heads;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  const int64_t blocks = total / own + call.num_sequences;
  task.relation = &params.relations[block / blocks];
  block %= blocks;
  int64_t low = 0, high = call.num_sequences - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (call.starts[middle] / own + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  task.n = low;
  bool valid = find_sequence(call, low, task.sequence);
  int64_t first = (block - call.starts[low] / own - low) * own;
  task.empty = !valid || first < 0 || first >= task.sequence.length || task.sequence.length < params.min_length ||
               task.sequence.length > params.max_length;
  task.first = task.empty ? 0 : static_cast<int>(first);
  *partial = params.partials + task.relation->index * params.slots + params.first_slot + block * call.num_heads + task.head;
  return task;
}

// Where the statistics of a task's rows lie in scratch memory.
MINILM_DEVICE int64_t first_row_stats(const LaunchParams& params, const RowWork& task) {
  const Call& call = params.call;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  return (task.relation->index * call.num_heads + task.head) * total + task.sequence.first;
}

MINILM_DEVICE RowStats at(const LaunchParams& params, int64_t row) {
  const int64_t all = params.row_stats_stride;
  float* first = params.row_stats + row;
  return {first, first + all, first + 2 * all, first + 3 * all};
}

// Where the rows of a task's sequence lie in (R, N, A, S) or (R, A, T).
MINILM_DEVICE int64_t first_row(const LaunchParams& params, const RowWork& task) {
  const Call& call = params.call;
  const int64_t matrices = call.packed ? 1 : call.num_sequences;
  return ((task.relation->index * matrices + task.sequence.params) * call.num_heads + task.head) * call.positions;
}

// The other tokens that some own token sees, or that see one: [first, end).
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

// Chunks and pieces of both models' tokens: those that a kernel is compiled for, or, where they are 0, those of the task.
template <int kChunksT, int kSplitsT, int kChunksS, int kSplitsS>
struct Shape {
  int given_chunks_t, given_splits_t, given_chunks_s, given_splits_s;

  MINILM_DEVICE explicit Shape(const Relation& relation)
      : given_chunks_t(chunks_of(relation.teacher.key.width)),
        given_splits_t(max_of(splits_of(relation.teacher.query.type), splits_of(relation.teacher.key.type))),
        given_chunks_s(chunks_of(relation.student.key.width)),
        given_splits_s(max_of(splits_of(relation.student.query.type), splits_of(relation.student.key.type))) {}
  MINILM_DEVICE int chunks_t() const { return kChunksT ? kChunksT : given_chunks_t; }
  MINILM_DEVICE int splits_t() const { return kSplitsT ? kSplitsT : given_splits_t; }
  MINILM_DEVICE int chunks_s() const { return kChunksS ? kChunksS : given_chunks_s; }
  MINILM_DEVICE int splits_s() const { return kSplitsS ? kSplitsS : given_splits_s; }
};

// kExact: as exp2_of, in the visit that follows as well.
template <bool kExact, int kChunksT, int kSplitsT, int kChunksS, int kSplitsS>
struct RowStatsKernel {
  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    const int own = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const RowWork task = find_row_work(params, own, &partial);
    if (task.empty) return;
    const Sequence& sequence = task.sequence;
    const Relation& relation = *task.relation;
    const Shape<kChunksT, kSplitsT, kChunksS, kSplitsS> shape(relation);
    const int chunks_t = shape.chunks_t(), splits_t = shape.splits_t();
    const int chunks_s = shape.chunks_s(), splits_s = shape.splits_s();
    const RowWiseLayout shared(memory, own, params.capacity, chunks_t * splits_t, chunks_s * splits_s, 0);
    load_tokens(relation.teacher.query, sequence, task.head, task.first, own, writable(shared.own_t), shared.own_t.plane,
                chunks_t, splits_t);
    load_tokens(relation.student.query, sequence, task.head, task.first, own, writable(shared.own_s), shared.own_s.plane,
                chunks_s, splits_s);
    const TokenRange streamed = find_streamed(sequence, task.first, own, true, false);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;

    PerRow max_t, max_s, total_t, total_s;
    MINILM_UNROLL for (int i = 0; i < 4; ++i) {
      max_t[i / 2][i % 2] = max_s[i / 2][i % 2] = kNegInf;
      total_t[i / 2][i % 2] = total_s[i / 2][i % 2] = 0.0f;
    }
    MINILM_NO_UNROLL for (int first = streamed.first; first < streamed.end; first += params.capacity) {
      syncthreads();
      load_tokens(relation.teacher.key, sequence, task.head, first, params.capacity, writable(shared.other_t),
                  shared.other_t.plane, chunks_t, splits_t);
      load_tokens(relation.student.key, sequence, task.head, first, params.capacity, writable(shared.other_s),
                  shared.other_s.plane, chunks_s, splits_s);
      syncthreads();
      MINILM_NO_UNROLL for (int tile = 0; tile < params.capacity; tile += kTile) {
        const TileOrigin origin{task.first + warp, first + tile};
        float score[2][4][4];
        scores(score, at(shared.own_t, warp), at(shared.other_t, tile), chunks_t, splits_t);
        add_row_stats<kExact>(max_t, total_t, score, scale_t, sequence, origin);
        scores(score, at(shared.own_s, warp), at(shared.other_s, tile), chunks_s, splits_s);
        add_row_stats<kExact>(max_s, total_s, score, scale_s, sequence, origin);
      }
    }
    const RowStats out = at(params, first_row_stats(params, task) + task.first + warp);
    const int end = sequence.length - task.first - warp;
    write_row_stats<kExact>(out.log2_sum_t, out.max_t, max_t, total_t, end);
    write_row_stats<kExact>(out.log2_sum_s, out.max_s, max_s, total_s, end);
  }
};

// 1: the own tokens are rows; 2: they are keys; 3: they are both.
template <int kDirection>
struct Direction {
  static constexpr int value = kDirection;
};

// kPieces: of the student's tokens and of M in the gradient; 0: no gradient.
template <int kSplits, int kChunksT, int kSplitsT, int kChunksS, int kSplitsS>
struct RowWiseKernel {
  static constexpr bool kExact = kSplits == 0 || kSplits == 3;

  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    const Call& call = params.call;
    const int own_tokens = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const RowWork task = find_row_work(params, own_tokens, &partial);
    if (task.empty) {
      if (thread_index() == 0 && call.values && !params.keys) *partial = 0.0;
      return;
    }
    const Sequence& sequence = task.sequence;
    const Relation& relation = *task.relation;
    const bool forward = !params.keys, backward = kSplits > 0 && (params.keys || relation.self);
    const TensorView &own_x_t = params.keys ? relation.teacher.key : relation.teacher.query;
    const TensorView &own_x_s = params.keys ? relation.student.key : relation.student.query;
    const TensorView &other_x_t = params.keys ? relation.teacher.query : relation.teacher.key;
    const TensorView &other_x_s = params.keys ? relation.student.query : relation.student.key;
    const Shape<kChunksT, kSplitsT, kChunksS, kSplits ? kSplits : kSplitsS> shape(relation);
    const int chunks_t = shape.chunks_t(), splits_t = shape.splits_t();
    const int chunks_s = shape.chunks_s(), splits_s = shape.splits_s();
    const RowWiseLayout shared(memory, own_tokens, params.capacity, chunks_t * splits_t, chunks_s * splits_s,
                      kSplits ? chunks_s : 0);
    const int64_t row_stats_at = first_row_stats(params, task), row_at = first_row(params, task);

    load_tokens(own_x_t, sequence, task.head, task.first, own_tokens, writable(shared.own_t), shared.own_t.plane,
                chunks_t, splits_t);
    load_tokens(own_x_s, sequence, task.head, task.first, own_tokens, writable(shared.own_s), shared.own_s.plane,
                chunks_s, splits_s);
    load_row_stats(params, sequence, row_stats_at, row_at, task.first, own_tokens, shared.own_rows, shared.own_weights);
    if (kSplits)
      for (int i = thread_index(); i < chunks_s * own_tokens * 8; i += thread_count()) shared.grads[i] = 0.0f;
    const TokenRange streamed = find_streamed(sequence, task.first, own_tokens, forward, backward);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;
    const TileOperands own = at(TileOperands{shared.own_t, shared.own_s, shared.own_rows, shared.own_weights}, warp);
    const TileOperands all{shared.other_t, shared.other_s, shared.other_rows, shared.other_weights};

    PerRow kl = {};
    MINILM_NO_UNROLL for (int first = streamed.first; first < streamed.end; first += params.capacity) {
      syncthreads();
      load_tokens(other_x_t, sequence, task.head, first, params.capacity, writable(shared.other_t), shared.other_t.plane,
                  chunks_t, splits_t);
      load_tokens(other_x_s, sequence, task.head, first, params.capacity, writable(shared.other_s), shared.other_s.plane,
                  chunks_s, splits_s);
      load_row_stats(params, sequence, row_stats_at, row_at, first, params.capacity, shared.other_rows, shared.other_weights);
      syncthreads();
      MINILM_NO_UNROLL for (int tile = 0; tile < params.capacity; tile += kTile) {
        const TileOrigin origin{task.first + warp, first + tile};
        const TileOperands other = at(all, tile);
        float* sums = shared.grads + warp * 8;
        auto visit = [&](auto direction) {
          row_wise_tile<kSplits, kExact, (direction.value != 2), (direction.value != 1)>(
              own, other, chunks_t, splits_t, chunks_s, splits_s, scale_t, scale_s, sequence, origin, kl, sums,
              own_tokens * 8);
        };
        if (kSplits == 0 || !backward)
          visit(Direction<1>{});
        else if (forward)
          visit(Direction<kSplits ? 3 : 1>{});
        else
          visit(Direction<kSplits ? 2 : 1>{});
      }
    }

    if (forward) write_rows(params, task, kl, row_at, warp, shared.scratch, partial);
    if (kSplits) {
      syncthreads();
      write_gradient(params, task, own_x_s.width, chunks_s, shared);
    }
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
      weights[i] = !valid ? 0.0f : given ? given[row_at + sequence.tokens[first + i]] : 1.0f;
    }
  }

  static MINILM_DEVICE void write_rows(const LaunchParams& params, const RowWork& task, PerRow& kl, int64_t row_at, int warp,
                                       double* scratch, double* partial) {
    const Call& call = params.call;
    double value = 0.0;
    MINILM_UNROLL for (int i = 0; i < 4; ++i) {
      float row = kl[i / 2][i % 2];
      row += shuffle_xor(row, 1);
      row += shuffle_xor(row, 2);
      row = row < 0.0f ? 0.0f : row;
      const int token = task.first + warp + own_row(i / 2, i % 2);
      if (lane_index() % 4 == 0 && token < task.sequence.length) {
        if (call.rows) call.rows[row_at + task.sequence.tokens[token]] = row;
        value += row;
      }
    }
    if (call.values) {
      value = block_sum(value, scratch);
      if (thread_index() == 0) *partial = call.weights[task.n] * value;
    }
  }

  static MINILM_DEVICE void write_gradient(const LaunchParams& params, const RowWork& task, int width, int chunks,
                                           const RowWiseLayout& shared) {
    const Call& call = params.call;
    const Relation& relation = *task.relation;
    const float factor = relation.student.scale * (call.weights ? call.weights[task.n] : 1.0f);
    float* out = (params.keys ? relation.key_grad : relation.query_grad) +
                 (task.sequence.params * call.positions * call.num_heads + task.head) * width;
    for (int item = thread_index(); item < shared.own * chunks; item += thread_count()) {
      const int slot = item / chunks, chunk = item % chunks;
      if (task.first + slot < task.sequence.length)
        write_chunk(out + task.sequence.tokens[task.first + slot] * call.num_heads * width, width, chunk,
                    shared.grads + (chunk * shared.own + slot) * 8, factor);
    }
  }
};

// Of malformed sequences the values are NaN: on a device nothing checks cu_seqlens, and nobody waits to raise an error.
struct ReductionKernel {
  static MINILM_DEVICE void run(const ReduceParams& reduction, char* memory) {
    const Call& call = reduction.call;
    const int r = static_cast<int>(block_index());
    const double* partials = reduction.partials + reduction.index[r] * reduction.slots;
    const int64_t first = reduction.fused[r] ? 0 : reduction.symmetric_slots;
    const int64_t end = reduction.rows[r] ? reduction.slots : reduction.symmetric_slots;
    double value = 0.0, broken = 0.0;
    for (int64_t i = first + thread_index(); i < end; i += thread_count()) value += partials[i];
    for (int64_t n = thread_index(); n < call.num_sequences; n += thread_count()) {
      Sequence sequence;
      if (!find_sequence(call, n, sequence)) broken = 1.0;
    }
    value = block_sum(value, reinterpret_cast<double*>(memory));
    broken = block_sum(broken, reinterpret_cast<double*>(memory));
    if (thread_index() == 0)
      call.values[reduction.index[r]] = broken > 0.0 ? as_float(0x7fc00000u) : static_cast<float>(value);
  }
};

}  // namespace minilm::cuda
