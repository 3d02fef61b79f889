// Row by row with running maxima: for everything that unordered pairs do not serve. First the log-sum-exps of a warp's
// own rows, then, with the scores again, KL and excess. See docs/cuda.md.
#pragma once

#include "tile.cuh"

namespace minilm::cuda {

constexpr float kNothing = -1e30f;  // the maximum of no score

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
struct RowStatistics {
  float *rest_t, *rest_s, *most_t, *most_s;
};

// Tokens of one side of the pairs, as a visit sees them; the arrays run beside the tokens.
struct View {
  Tokens teacher, student;
  RowStatistics rows;
  const float* weights;  // of the rows in the gradient; null: 1
};
MINILM_DEVICE View at(const View& x, int token) {
  const RowStatistics& rows = x.rows;
  return {at(x.teacher, token), at(x.student, token),
          {rows.rest_t + token, rows.rest_s + token, rows.most_t + token, rows.most_s + token},
          x.weights ? x.weights + token : nullptr};
}

// Where a tile lies in the sequence, and what its pairs see.
struct Place {
  int own, other;  // first tokens
};

// Of the 4 own rows that a lane holds: [m][e / 2].
using PerRow = float[2][2];

MINILM_DEVICE int own_row(int m, int half) { return 16 * m + 8 * half + lane_index() / 4; }
MINILM_DEVICE int other_column(int n, int e) { return 8 * n + lane_index() % 4 * 2 + e % 2; }

// Scores of a tile join the running maxima and sums of 2^(u − maximum), each lane for its own columns.
template <bool kExact>
MINILM_DEVICE void add_statistics(PerRow& maximum, PerRow& total, const float (&score)[2][4][4], float scale,
                                  const Sequence& sequence, Place place) {
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int half = 0; half < 2; ++half) {
      int visible = bound_of(sequence, place.own + own_row(m, half)) - place.other;
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
MINILM_DEVICE void write_statistics(float* rest, float* at_most, const PerRow& maximum, const PerRow& total, int end) {
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
MINILM_DEVICE void add_excess(const float (&score_t)[2][2][4], float (&score_s)[2][2][4], float scale_t, float scale_s,
                              const Sequence& sequence, Place place, const View& own, const View& other, PerRow& kl) {
  MINILM_UNROLL for (int n = 0; n < 2; ++n)
    MINILM_UNROLL for (int c = 0; c < 2; ++c) {
      const int column = other_column(n, c);
      float other_t = 0.0f, other_s = 0.0f, most_t = 0.0f, most_s = 0.0f, other_weight = 1.0f;
      int visible_to_other = 0;
      if (kBackward) {
        other_t = other.rows.rest_t[column];
        other_s = other.rows.rest_s[column];
        if (kExact) {
          most_t = other.rows.most_t[column];
          most_s = other.rows.most_s[column];
        }
        if (other.weights) other_weight = other.weights[column];
        visible_to_other = bound_of(sequence, place.other + column) - place.own;
      }
      MINILM_UNROLL for (int m = 0; m < 2; ++m)
        MINILM_UNROLL for (int half = 0; half < 2; ++half) {
          const int row = own_row(m, half), e = 2 * half + c;
          const float x_t = score_t[m][n][e], x_s = score_s[m][n][e];
          float excess = 0.0f;
          if (kForward) {
            float log_p = log2_of<kExact>(x_t, scale_t, own.rows.rest_t[row], own.rows.most_t + row);
            float log_q = log2_of<kExact>(x_s, scale_s, own.rows.rest_s[row], own.rows.most_s + row);
            float p = exp2_of<kExact>(log_p), q = exp2_of<kExact>(log_q);
            bool visible = place.other + column < bound_of(sequence, place.own + row);
            kl[m][half] += visible ? exact_term(p, q, log_q - log_p) : 0.0f;
            float weight = own.weights ? own.weights[row] : 1.0f;
            excess = visible ? weight * (q - p) : 0.0f;
          }
          if (kBackward) {
            float p = exp2_of<kExact>(log2_of<kExact>(x_t, scale_t, other_t, &most_t));
            float q = exp2_of<kExact>(log2_of<kExact>(x_s, scale_s, other_s, &most_s));
            excess += row < visible_to_other ? other_weight * (q - p) : 0.0f;
          }
          score_s[m][n][e] = excess;
        }
    }
}

// A tile of own and other tokens: KL of the own rows and, with kPieces, what the tile adds to the own tokens' gradient.
template <int kPieces, bool kExact, bool kForward, bool kBackward>
MINILM_DEVICE void visit_tile(const View& own, const View& other, int chunks_t, int pieces_t, int chunks_s, int pieces_s,
                              float scale_t, float scale_s, const Sequence& sequence, Place place, PerRow& kl,
                              float* sums, int plane) {
  MINILM_NO_UNROLL for (int half = 0; half < 2; ++half) {
    const View columns = at(other, 16 * half);
    float score_t[2][2][4], score_s[2][2][4];
    scores(score_t, own.teacher, columns.teacher, chunks_t, pieces_t);
    scores(score_s, own.student, columns.student, chunks_s, pieces_s);
    add_excess<kExact, kForward, kBackward>(score_t, score_s, scale_t, scale_s, sequence, {place.own, place.other + 16 * half},
                                    own, columns, kl);
    if constexpr (kPieces > 0)
      add_gradients<kPieces, false>(score_s, sums, nullptr, plane, own.student, columns.student, chunks_s);
  }
}

}  // namespace minilm::cuda
