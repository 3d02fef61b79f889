// Training scalars of self relations: a block owns one (sequence, head, relation), keeps it in shared memory, visits each
// unordered pair once in each of two phases, and leaves KL and gradient. Derivation and cost: docs/cuda.md.
#pragma once

#include "schedule.h"
#include "visit.cuh"

namespace minilm::cuda {

// With u_ij = s_ij − reference, every 2^u_ii lies within 2^±100 and every 2^u_ij below 2^100; a wider range of s_ii goes
// row by row.
constexpr float kWidestRange = 200.0f;

// Shorter sequences go row by row: too few rows for the rounding of the value to average out.
constexpr int kFewTokens = 64;

// What a block works on, kept in shared memory and read again for every tile: in registers it would be in the way.
struct Header {
  Sequence sequence;
  const Relation* relation;
  int64_t n, head;
  int capacity, tiles, bound, chunks_t, pieces_t, chunks_s;  // bound: of the rows that columns behind them see
  float scale_t, scale_s, reference_t, reference_s;
};
static_assert(sizeof(Header) <= kHeaderBytes, "");

// Shared memory of a block; `fused_bytes` in plan.h is its size. Kernels are compiled for the chunks and pieces of one
// call; where they are 0 here, as in the emulation, those of the header count.
template <int kPieces, int kChunksT, int kPiecesT, int kChunksS>
struct Fused {
  char* memory;

  MINILM_DEVICE Header& header() const { return *reinterpret_cast<Header*>(memory); }
  MINILM_DEVICE double* scratch() const { return reinterpret_cast<double*>(memory + kHeaderBytes); }
  MINILM_DEVICE int chunks_t() const { return kChunksT ? kChunksT : header().chunks_t; }
  MINILM_DEVICE int pieces_t() const { return kPiecesT ? kPiecesT : header().pieces_t; }
  MINILM_DEVICE int chunks_s() const { return kChunksS ? kChunksS : header().chunks_s; }
  MINILM_DEVICE int plane() const { return header().capacity * 16; }
  MINILM_DEVICE char* planes() const { return memory + kHeaderBytes + kScratchBytes; }
  MINILM_DEVICE Tokens teacher(int token) const { return {planes() + token * 16, plane()}; }
  MINILM_DEVICE Tokens student(int token) const {
    return {planes() + chunks_t() * pieces_t() * plane() + token * 16, plane()};
  }
  MINILM_DEVICE float* grads(int token) const {  // [chunk][token][8]
    return reinterpret_cast<float*>(planes() + (chunks_t() * pieces_t() + chunks_s() * kPieces) * plane()) + token * 8;
  }
  MINILM_DEVICE int grads_plane() const { return header().capacity * 8; }
  MINILM_DEVICE float* sums_t() const { return grads(0) + chunks_s() * grads_plane(); }  // of phase 1, then inverse
  MINILM_DEVICE float* sums_s() const { return sums_t() + header().capacity; }
  MINILM_DEVICE RowStatistics statistics() const {  // the largest u of float32 students only
    const int capacity = header().capacity;
    float* first = sums_t();
    return {first, first + capacity, first + 2 * capacity, first + 3 * capacity};
  }
};

struct Range {
  float low, high;
};

MINILM_DEVICE Range range_of_block(Range x, double* scratch) {
  float* pairs = reinterpret_cast<float*>(scratch);
  MINILM_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    x.low = fminf(x.low, shuffle_xor(x.low, mask));
    x.high = fmaxf(x.high, shuffle_xor(x.high, mask));
  }
  sync_block();
  if (lane_index() == 0) {
    pairs[2 * warp_index()] = x.low;
    pairs[2 * warp_index() + 1] = x.high;
  }
  sync_block();
  x = {pairs[0], pairs[1]};
  for (int w = 1; w < thread_count() / 32; ++w) {
    x.low = fminf(x.low, pairs[2 * w]);
    x.high = fmaxf(x.high, pairs[2 * w + 1]);
  }
  return x;
}

// The range of s_ii in bits; infinitely wide where one is not finite.
MINILM_DEVICE Range range_of_norms(const Tokens& x, int length, int chunks, int pieces, float scale, double* scratch) {
  Range range{3e38f, -3e38f};
  for (int i = thread_index(); i < length; i += thread_count()) {
    float norm = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float value[8] = {};
      for (int piece = 0; piece < pieces; ++piece) {
        Words words = load_words(x.planes + (piece * chunks + chunk) * x.plane + i * 16);
        MINILM_UNROLL for (int d = 0; d < 4; ++d) {
          value[2 * d] += low_of(words.word[d]);
          value[2 * d + 1] += high_of(words.word[d]);
        }
      }
      MINILM_UNROLL for (int d = 0; d < 8; ++d) norm = fmaf(value[d], value[d], norm);
    }
    norm *= scale;
    bool finite = norm < 3e38f;
    range.low = finite ? fminf(range.low, norm) : -3e38f;
    range.high = finite ? fmaxf(range.high, norm) : 3e38f;
  }
  return range_of_block(range, scratch);
}

// A tile of unordered pairs by its first row and column; the rows lie behind the columns or are the same. Columns see
// the rows below `bound`, the prefix.
struct Pairs {
  int rows, columns;
};

// x[k] of lanes whose number has `low_bit`… bits k: sums over the lanes that differ in these bits, spread over them.
template <int kCount>
MINILM_DEVICE float spread_sums(float (&x)[kCount], int bit) {
  MINILM_UNROLL for (int count = kCount / 2; count > 0; count /= 2) {
    bool upper = (lane_index() & (bit * count)) != 0;
    MINILM_UNROLL for (int k = 0; k < count; ++k) {
      float keep = upper ? x[count + k] : x[k], give = upper ? x[k] : x[count + k];
      x[k] = keep + shuffle_xor(give, bit * count);
    }
  }
  return x[0];
}

// Phase 1 of one model: exponentials of a tile to the sums of its rows and, mirrored, of its columns. Nothing else of
// the warp's round touches these places (schedule.h).
template <bool kMasked, bool kCausal>
MINILM_DEVICE void add_sums(float* sums, const float (&score)[2][4][4], float scale, float reference,
                            const Pairs& pairs, int bound) {
  float row[4] = {}, column[8] = {};
  const int lane = lane_index();
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int n = 0; n < 4; ++n)
      MINILM_UNROLL for (int e = 0; e < 4; ++e) {
        float x = exp2_fast(fmaf(score[m][n][e], scale, -reference));
        float mirror = x;
        if (kMasked) {
          int i = pairs.rows + own_row(m, e / 2), j = pairs.columns + other_column(n, e);
          if (j > i) x = 0.0f;
          if (j >= i || i >= bound) mirror = 0.0f;
        }
        row[2 * m + e / 2] += x;
        column[2 * n + e % 2] += mirror;
      }
  float row_sum = spread_sums(row, 1);
  float* row_at = sums + pairs.rows + lane % 4 * 8 + lane / 4;
  *row_at += row_sum;
  if (!kCausal || pairs.rows < bound) {
    float column_sum = spread_sums(column, 4);
    if (kMasked) sync_warp();  // on the diagonal rows and columns are the same places
    float* column_at = sums + pairs.columns + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    *column_at += column_sum;
  }
}

// Phase 2, half a tile: M_ij = q_ij + q_ji − p_ij − p_ji in the student's place, and what it adds to the value.
template <bool kMasked, bool kCausal>
MINILM_DEVICE float find_excess(const float (&score_t)[2][2][4], float (&score_s)[2][2][4], float scale_t, float scale_s,
                                float reference_t, float reference_s, const float* inverse_t, const float* inverse_s,
                                const Pairs& pairs, int half, int bound) {
  float row_t[2][2], row_s[2][2];
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int h = 0; h < 2; ++h) {
      row_t[m][h] = inverse_t[pairs.rows + own_row(m, h)];
      row_s[m][h] = inverse_s[pairs.rows + own_row(m, h)];
    }
  float excess = 0.0f, divergence = 0.0f;
  MINILM_UNROLL for (int n = 0; n < 2; ++n) {
    const int column = pairs.columns + 16 * half + other_column(n, 0);
    Pair column_t = load_pair(inverse_t + column), column_s = load_pair(inverse_s + column);
    if (kCausal && pairs.rows >= bound) column_t = column_s = {0.0f, 0.0f};
    MINILM_UNROLL for (int m = 0; m < 2; ++m)
      MINILM_UNROLL for (int e = 0; e < 4; ++e) {
        float u_t = fmaf(score_t[m][n][e], scale_t, -reference_t);
        float u_s = fmaf(score_s[m][n][e], scale_s, -reference_s);
        float factor_t = row_t[m][e / 2], factor_s = row_s[m][e / 2];
        float back_t = e % 2 ? column_t.y : column_t.x, back_s = e % 2 ? column_s.y : column_s.x;
        if (kMasked) {
          int i = pairs.rows + own_row(m, e / 2), j = column + e % 2;
          if (j > i) factor_t = factor_s = 0.0f;
          if (j >= i || i >= bound) back_t = back_s = 0.0f;
        }
        float p = exp2_fast(u_t) * (factor_t + back_t);
        float x = fmaf(exp2_fast(u_s), factor_s + back_s, -p);
        excess += x;
        divergence = fmaf(p, u_s - u_t, divergence);
        score_s[m][n][e] = x;
      }
  }
  return fmaf(-kLn2, divergence, excess);
}

MINILM_DEVICE float log2_of_ratio(float x, float y) {
  float ratio = x / y;
  return ratio > 1e-30f && ratio < 1e30f ? log2f(ratio) : log2f(x) - log2f(y);
}

// kPieces: of a student's token and of M. kCausal: the mask is causal, with a prefix or without.
template <int kPieces, int kChunksT, int kPiecesT, int kChunksS, bool kCausal>
struct FusedKernel {
  using Shared = Fused<kPieces, kChunksT, kPiecesT, kChunksS>;
  static constexpr bool kExact = kPieces == 3;

  static MINILM_DEVICE void run(const Batch& batch, char* memory) {
    const Shared shared{memory};
    Header& header = shared.header();
    if (thread_index() == 0) find_work(batch, header);
    sync_block();
    if (header.sequence.length == 0) return;

    load(batch, shared);
    const Range range_t = range_of_norms(shared.teacher(0), header.sequence.length, shared.chunks_t(),
                                         shared.pieces_t(), header.scale_t, shared.scratch());
    const Range range_s = range_of_norms(shared.student(0), header.sequence.length, shared.chunks_s(), kPieces,
                                         header.scale_s, shared.scratch());
    if (thread_index() == 0) {
      header.reference_t = range_t.low + (range_t.high - range_t.low) / 2;
      header.reference_s = range_s.low + (range_s.high - range_s.low) / 2;
    }
    sync_block();
    const bool shares_reference = header.sequence.length >= kFewTokens &&
                                  range_t.high - range_t.low <= kWidestRange &&
                                  range_s.high - range_s.low <= kWidestRange;
    double value = shares_reference ? unordered(shared) : row_by_row(shared);
    write(batch, shared, sum_of_block(value, shared.scratch()));
  }

  // A sequence that is empty, malformed, or not for this launch gets the length 0 and the value 0.
  static MINILM_DEVICE void find_work(const Batch& batch, Header& header) {
    const Common& call = batch.common;
    int64_t block = block_index();
    header.head = block % call.num_heads;
    block /= call.num_heads;
    header.n = block % call.num_sequences;
    const Relation& relation = batch.relations[block / call.num_sequences];
    header.relation = &relation;
    bool valid = find_sequence(call, header.n, header.sequence);
    if (!valid || header.sequence.length < batch.shortest || header.sequence.length > batch.longest) {
      header.sequence.length = header.sequence.prefix = 0;
      *partial_of(batch, header) = 0.0;
    }
    header.capacity = batch.capacity;
    header.tiles = (header.sequence.length + kTile - 1) / kTile;
    header.bound = header.sequence.prefix;
    header.chunks_t = chunks_of(relation.teacher.key.width);
    header.pieces_t = pieces_of(relation.teacher.key.type);
    header.chunks_s = chunks_of(relation.student.key.width);
    header.scale_t = relation.teacher.scale * kLog2e;
    header.scale_s = relation.student.scale * kLog2e;
  }

  static MINILM_DEVICE double* partial_of(const Batch& batch, const Header& header) {
    return batch.partials + header.relation->index * batch.slots + header.n * batch.common.num_heads + header.head;
  }

  static MINILM_DEVICE void load(const Batch& batch, const Shared& shared) {
    const Header& header = shared.header();
    const int tokens = header.tiles * kTile;
    load_tokens(header.relation->teacher.key, header.sequence, header.head, 0, tokens, writable(shared.teacher(0)),
                shared.plane(), shared.chunks_t(), shared.pieces_t());
    load_tokens(header.relation->student.key, header.sequence, header.head, 0, tokens, writable(shared.student(0)),
                shared.plane(), shared.chunks_s(), kPieces);
    for (int i = thread_index(); i < tokens; i += thread_count()) {
      shared.sums_t()[i] = shared.sums_s()[i] = 0.0f;
      for (int chunk = 0; chunk < shared.chunks_s(); ++chunk) {
        float* grad = shared.grads(i) + chunk * shared.grads_plane();
        store_words(grad, Words{});
        store_words(grad + 4, Words{});
      }
    }
    sync_block();
  }

  static MINILM_DEVICE void write(const Batch& batch, const Shared& shared, double value) {
    const Common& call = batch.common;
    const Header& header = shared.header();
    const Sequence& sequence = header.sequence;
    const float weight = call.weights[header.n];
    if (thread_index() == 0) *partial_of(batch, header) = weight * (value < 0.0 ? 0.0 : value);
    const float factor = header.relation->student.scale * weight;
    const int width = header.relation->student.key.width, chunks = shared.chunks_s();
    const int64_t stride = call.num_heads * width;
    float* out = header.relation->query_grad + (sequence.batch * call.positions * call.num_heads + header.head) * width;
    for (int item = thread_index(); item < sequence.length * chunks; item += thread_count()) {
      int i = item / chunks, chunk = item % chunks;
      write_chunk(out + sequence.tokens[i] * stride, width, chunk, shared.grads(i) + chunk * shared.grads_plane(),
                  factor);
    }
  }

  static MINILM_DEVICE double unordered(const Shared& shared) {
    const Header& header = shared.header();
    for (int round = -1; round < rounds_of(header.tiles); ++round) {
      for (int k = warp_index(); k < pairs_of(header.tiles, round); k += thread_count() / 32) {
        const TilePair tile = tile_pair(header.tiles, round, k);
        if (tile.row < 0) continue;
        const Pairs pairs{tile.row * kTile, tile.column * kTile};
        if (is_masked(pairs, header.bound)) {
          add_tile_sums<true>(shared, pairs);
        } else {
          // static: begin sums
          add_tile_sums<false>(shared, pairs);
          // static: end sums
        }
      }
      sync_block();
    }

    ExactSum value;
    for (int i = thread_index(); i < header.tiles * kTile; i += thread_count()) {
      const bool real = i < header.sequence.length;
      float &l_t = shared.sums_t()[i], &l_s = shared.sums_s()[i];
      if (real) value += kLn2 * log2_of_ratio(l_s, l_t);
      l_t = real ? 1.0f / l_t : 0.0f;
      l_s = real ? 1.0f / l_s : 0.0f;
    }
    sync_block();

    for (int round = -1; round < rounds_of(header.tiles); ++round) {
      for (int k = warp_index(); k < pairs_of(header.tiles, round); k += thread_count() / 32) {
        const TilePair tile = tile_pair(header.tiles, round, k);
        if (tile.row < 0) continue;
        const Pairs pairs{tile.row * kTile, tile.column * kTile};
        if (is_masked(pairs, header.bound)) {
          value += add_tile_gradients<true>(shared, pairs);
        } else {
          // static: begin excess
          value += add_tile_gradients<false>(shared, pairs);
          // static: end excess
        }
      }
      sync_block();
    }
    return static_cast<double>(value.sum) + value.rest;
  }

  // Whether single pairs of a tile differ in what they see: on the diagonal, and where the sequence or the prefix ends
  // among its rows. Rows behind the sequence's end are not below the bound either, and count nothing themselves.
  static MINILM_DEVICE bool is_masked(const Pairs& pairs, int bound) {
    return pairs.rows == pairs.columns || (pairs.rows < bound && pairs.rows + kTile > bound);
  }

  template <bool kMasked>
  static MINILM_DEVICE void add_tile_sums(const Shared& shared, const Pairs& pairs) {
    const Header& header = shared.header();
    float score[2][4][4];
    scores(score, shared.teacher(pairs.rows), shared.teacher(pairs.columns), shared.chunks_t(), shared.pieces_t());
    add_sums<kMasked, kCausal>(shared.sums_t(), score, header.scale_t, header.reference_t, pairs, header.bound);
    scores(score, shared.student(pairs.rows), shared.student(pairs.columns), shared.chunks_s(), kPieces);
    add_sums<kMasked, kCausal>(shared.sums_s(), score, header.scale_s, header.reference_s, pairs, header.bound);
  }

  template <bool kMasked>
  static MINILM_DEVICE float add_tile_gradients(const Shared& shared, const Pairs& pairs) {
    const Header& header = shared.header();
    float value = 0.0f;
    MINILM_NO_UNROLL for (int half = 0; half < 2; ++half) {
      const int columns = pairs.columns + 16 * half;
      float score_t[2][2][4], score_s[2][2][4];
      scores(score_t, shared.teacher(pairs.rows), shared.teacher(columns), shared.chunks_t(), shared.pieces_t());
      scores(score_s, shared.student(pairs.rows), shared.student(columns), shared.chunks_s(), kPieces);
      value += find_excess<kMasked, kCausal>(score_t, score_s, header.scale_t, header.scale_s, header.reference_t,
                                    header.reference_s, shared.sums_t(), shared.sums_s(), pairs, half, header.bound);
      add_gradients<kPieces, true>(score_s, shared.grads(pairs.rows), shared.grads(columns), shared.grads_plane(),
                                   shared.student(pairs.rows), shared.student(columns), shared.chunks_s());
    }
    return value;
  }

  // The range of s_ii is too wide for one reference, or rows are few: rows with maxima of their own.
  static MINILM_DEVICE double row_by_row(const Shared& shared) {
    const Header& header = shared.header();
    const int warps = thread_count() / 32;
    for (int tile = warp_index(); tile < header.tiles; tile += warps) {
      MINILM_NO_UNROLL for (int side = 0; side < 2; ++side) {
        PerRow maximum, total;
        MINILM_UNROLL for (int i = 0; i < 4; ++i) {
          maximum[i / 2][i % 2] = kNothing;
          total[i / 2][i % 2] = 0.0f;
        }
        MINILM_NO_UNROLL for (int other = 0; other < header.tiles; ++other) {
          float score[2][4][4];
          const Tokens rows = side ? shared.student(tile * kTile) : shared.teacher(tile * kTile);
          const Tokens columns = side ? shared.student(other * kTile) : shared.teacher(other * kTile);
          scores(score, rows, columns, side ? shared.chunks_s() : shared.chunks_t(),
                 side ? kPieces : shared.pieces_t());
          add_statistics<kExact>(maximum, total, score, side ? header.scale_s : header.scale_t, header.sequence,
                                 {tile * kTile, other * kTile});
        }
        const RowStatistics rows = shared.statistics();
        write_statistics<kExact>((side ? rows.rest_s : rows.rest_t) + tile * kTile,
                                 (side ? rows.most_s : rows.most_t) + tile * kTile, maximum, total, kTile);
      }
    }
    sync_block();
    double value = 0.0;
    for (int tile = warp_index(); tile < header.tiles; tile += warps) {
      PerRow kl = {};
      MINILM_NO_UNROLL for (int other = 0; other < header.tiles; ++other) {
        const View all{shared.teacher(0), shared.student(0), shared.statistics(), nullptr};
        visit_tile<kPieces, kExact, true, true>(
            at(all, tile * kTile), at(all, other * kTile), shared.chunks_t(), shared.pieces_t(), shared.chunks_s(),
            kPieces, header.scale_t, header.scale_s, header.sequence, {tile * kTile, other * kTile}, kl,
            shared.grads(tile * kTile), shared.grads_plane());
      }
      MINILM_UNROLL for (int i = 0; i < 4; ++i) value += kl[i / 2][i % 2];
    }
    return value;
  }
};

}  // namespace minilm::cuda
