// The symmetric path: reduced losses of self relations, with gradient. A block keeps one head of one sequence in one
// relation in shared memory and computes the loss and the gradient in two phases. With one reference score for all
// rows, exponentials are symmetric (E_ij = E_ji), and each phase computes them once. docs/cuda.md has the derivation
// and the cost.
#pragma once

#include "row_wise.cuh"
#include "schedule.cuh"
#include "strips.cuh"

namespace minilm::cuda {

// Widest range of s_ii in bits. The reference is the middle of the range, and u_ij = s_ij - reference. Every 2^u_ii is
// then within 2^±100, and every 2^u_ij is below 2^100. Sequences with a wider range take the row-wise path in the same
// block.
constexpr float kMaxNormRange = 200.0f;

// Sequences with fewer tokens take the row-wise path: the rounding errors of so few rows do not average out.
constexpr int kMinSymmetricTokens = 64;

// The work of a block. It is read from shared memory for every tile, which saves registers.
struct BlockState {
  Sequence sequence;
  const Relation* relation;
  int64_t n, head;
  int chunks_t, format_t, chunks_s;
  int bound;  // mirrored pairs (column, row) are visible if row < bound
  float scale_t, scale_s, reference_t, reference_s;
  float grad_factor;  // gradients in shared memory are too large by 1 / grad_factor, a power of two
  int capacity, tiles;
};
static_assert(sizeof(BlockState) <= kBlockStateBytes, "");

// Finds head number `index` of a launch. Sequences that are empty, malformed or excluded from this launch get length 0.
MINILM_DEVICE void find_head(const LaunchParams& params, int64_t index, BlockState& state) {
  const Call& call = params.call;
  state.head = index % call.num_heads;
  index /= call.num_heads;
  state.n = index % call.num_sequences;
  const Relation& relation = params.relations[index / call.num_sequences];
  state.relation = &relation;
  bool valid = find_sequence(call, state.n, state.sequence);
  if (!valid || state.sequence.length < params.min_length || state.sequence.length > params.max_length)
    state.sequence.length = state.sequence.prefix = 0;
  state.capacity = params.capacity;
  state.bound = state.sequence.prefix;
  state.chunks_t = chunks_of(relation.teacher.key.width);
  state.format_t = format_of(relation.teacher.key.dtype);
  state.chunks_s = chunks_of(relation.student.key.width);
  state.scale_t = relation.teacher.scale * kLog2e;
  state.scale_s = relation.student.scale * kLog2e;
}

MINILM_DEVICE float middle_of(const Range& range) { return range.low + (range.high - range.low) / 2; }

// One reference score serves all rows of a head. It does not if a feature is not finite.
MINILM_DEVICE bool shares_reference(int length, const Range& range_t, const Range& range_s) {
  return length >= kMinSymmetricTokens && range_t.high - range_t.low <= kMaxNormRange &&
         range_s.high - range_s.low <= kMaxNormRange;
}

// Exponent of the largest feature of a float32 student. Its tokens are multiplied by 2^(140 - exponent) for the
// gradient, so that this feature is between 2^13 and 2^14.
MINILM_DEVICE uint32_t exponent_of(float most) { return most > 1e-30f && most < 3e38f ? as_bits(most) >> 23 : 140; }
MINILM_DEVICE float token_factor(uint32_t exponent) { return as_float((267 - exponent) << 23); }
MINILM_DEVICE float grad_factor(uint32_t exponent) { return as_float((exponent - 13) << 23); }

// Layout of a block's shared memory; symmetric_bytes in launch_plan.h computes its size. Template arguments that are 0
// (in the emulation) are replaced by the values in the block's state.
template <int kFormat, int kChunksT, int kFormatT, int kChunksS>
struct SymmetricLayout {
  static constexpr int kTeacherFormat = kFormatT, kStudentFormat = kFormat;
  char* memory;

  MINILM_DEVICE BlockState& state() const { return *reinterpret_cast<BlockState*>(memory); }
  MINILM_DEVICE double* scratch() const { return reinterpret_cast<double*>(memory + kBlockStateBytes); }
  MINILM_DEVICE int chunks_t() const { return kChunksT ? kChunksT : state().chunks_t; }
  MINILM_DEVICE int format_t() const { return kFormatT ? kFormatT : state().format_t; }
  MINILM_DEVICE int chunks_s() const { return kChunksS ? kChunksS : state().chunks_s; }
  MINILM_DEVICE int plane() const { return state().capacity * 16; }
  MINILM_DEVICE char* planes() const { return memory + kBlockStateBytes + kScratchBytes; }
  MINILM_DEVICE Tokens teacher(int token) const { return {planes() + token * 16, plane()}; }
  MINILM_DEVICE Tokens student(int token) const {
    return {planes() + score_planes(format_t(), chunks_t()) * plane() + token * 16, plane()};
  }
  MINILM_DEVICE float* grads(int token) const {  // [chunk][token][8]
    const int planes_before = score_planes(format_t(), chunks_t()) + student_planes(kFormat, chunks_s());
    return reinterpret_cast<float*>(planes() + planes_before * plane()) + token * 8;
  }
  MINILM_DEVICE int grads_plane() const { return state().capacity * 8; }
  // Σ E of each row in phase 1, 1 / Σ E in phase 2.
  MINILM_DEVICE float* sums_t() const { return grads(0) + chunks_s() * grads_plane(); }
  MINILM_DEVICE float* sums_s() const { return sums_t() + state().capacity; }
  MINILM_DEVICE char* factors(int token) const { return reinterpret_cast<char*>(sums_t()) + token * 16; }
  MINILM_DEVICE RowStats row_stats() const {  // maxima are stored only with 3 splits
    const int capacity = state().capacity;
    float* first = sums_t();
    return {first, first + capacity, first + 2 * capacity, first + 3 * capacity};
  }
};

MINILM_DEVICE Range block_range(Range x, double* scratch) {
  float* bounds = reinterpret_cast<float*>(scratch);
  MINILM_UNROLL_FOR (int mask = 16; mask > 0; mask /= 2) {
    x.low = fminf(x.low, shuffle_xor(x.low, mask));
    x.high = fmaxf(x.high, shuffle_xor(x.high, mask));
  }
  syncthreads();
  if (lane_index() == 0) {
    bounds[2 * warp_index()] = x.low;
    bounds[2 * warp_index() + 1] = x.high;
  }
  syncthreads();
  x = {bounds[0], bounds[1]};
  for (int w = 1; w < thread_count() / 32; ++w) {
    x.low = fminf(x.low, bounds[2 * w]);
    x.high = fmaxf(x.high, bounds[2 * w + 1]);
  }
  return x;
}

MINILM_DEVICE void widen(Range& range, float norm) {
  const bool finite = norm < 3e38f;
  range.low = finite ? fminf(range.low, norm) : -3e38f;
  range.high = finite ? fmaxf(range.high, norm) : 3e38f;
}

// Smallest and largest s_ii in bits, or -3e38 and 3e38 if one of them is not finite.
MINILM_DEVICE Range range_of_norms(const Tokens& x, int length, int chunks, int format, float scale, double* scratch) {
  Range range{3e38f, -3e38f};
  for (int i = thread_index(); i < length; i += thread_count()) {
    float norm = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float value[8] = {};
      for (int split = 0; split < splits_in(format); ++split) {
        Uint4 words = load_uint4(x.planes + (split * chunks + chunk) * x.plane + i * 16);
        MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
          const uint32_t word = words.word[d];
          const Float2 pair = format == kFloat16 ? unpack_float16(word) : Float2{low_of(word), high_of(word)};
          value[2 * d] += pair.x;
          value[2 * d + 1] += pair.y;
        }
      }
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) norm = fmaf(value[d], value[d], norm);
    }
    if (format == kFloat32) {
      const Uint4 offset = load_uint4(x.planes + (score_planes(format, chunks) - 1) * x.plane + i * 16);
      norm = fmaf(2.0f, low_of(offset.word[0]) + (high_of(offset.word[0]) + low_of(offset.word[1])), norm);
    }
    widen(range, norm * scale);
  }
  return block_range(range, scratch);
}

// First row and first column of a tile. Rows are at or after the columns. Pairs (row, column) and mirrored pairs
// (column, row) are computed together. The mirrored pair is visible if row < `bound`, which is the end of the prefix.
struct PairTile {
  int rows, columns;
};

// Phase 1 for one model: adds the exponentials of a tile to the sums of its rows and, for mirrored pairs, of its
// columns. No other warp accesses these rows and columns in the same round (schedule.cuh).
template <bool kMasked, bool kCausal>
MINILM_DEVICE void add_sums(float* sums, const float (&score)[2][4][4], float scale, float reference,
                            const PairTile& tile, int bound) {
  float row[4] = {}, column[8] = {};
  const int lane = lane_index();
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int n = 0; n < 4; ++n)
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) {
        float x = exp2_fast(fmaf(score[m][n][e], scale, -reference));
        float mirror = x;
        if (kMasked) {
          int i = tile.rows + own_row(m, e / 2), j = tile.columns + other_column(n, e);
          if (j > i) x = 0.0f;
          if (j >= i || i >= bound) mirror = 0.0f;
        }
        row[2 * m + e / 2] += x;
        column[2 * n + e % 2] += mirror;
      }
  float row_sum = distributed_sums(row, 1);
  float* row_at = sums + tile.rows + lane % 4 * 8 + lane / 4;
  *row_at += row_sum;
  if (!kCausal || tile.rows < bound) {
    float column_sum = distributed_sums(column, 4);
    if (kMasked) syncwarp();  // on the diagonal, rows and columns are the same
    float* column_at = sums + tile.columns + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    *column_at += column_sum;
  }
}

// Phase 2 for half a tile: replaces the student's scores by the score gradients M_ij = q_ij + q_ji - p_ij - p_ji, and
// returns the half tile's contribution to the loss.
template <bool kMasked, bool kCausal>
MINILM_DEVICE float find_score_grads(const float (&score_t)[2][2][4], float (&score_s)[2][2][4], float scale_t,
                                     float scale_s, float reference_t, float reference_s, const float* inverse_t,
                                     const float* inverse_s, const PairTile& tile, int half, int bound) {
  float row_t[2][2], row_s[2][2];
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int h = 0; h < 2; ++h) {
      row_t[m][h] = inverse_t[tile.rows + own_row(m, h)];
      row_s[m][h] = inverse_s[tile.rows + own_row(m, h)];
    }
  float total_grad = 0.0f, divergence = 0.0f;
  MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) {
    const int column = tile.columns + 16 * half + other_column(n, 0);
    Float2 column_t = load_float2(inverse_t + column), column_s = load_float2(inverse_s + column);
    if (kCausal && tile.rows >= bound) column_t = column_s = {0.0f, 0.0f};
    MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) {
        float u_t = fmaf(score_t[m][n][e], scale_t, -reference_t);
        float u_s = fmaf(score_s[m][n][e], scale_s, -reference_s);
        float factor_t = row_t[m][e / 2], factor_s = row_s[m][e / 2];
        float mirrored_t = e % 2 ? column_t.y : column_t.x, mirrored_s = e % 2 ? column_s.y : column_s.x;
        if (kMasked) {
          int i = tile.rows + own_row(m, e / 2), j = column + e % 2;
          if (j > i) factor_t = factor_s = 0.0f;
          if (j >= i || i >= bound) mirrored_t = mirrored_s = 0.0f;
        }
        float p = exp2_fast(u_t) * (factor_t + mirrored_t);
        float x = fmaf(exp2_fast(u_s), factor_s + mirrored_s, -p);
        total_grad += x;
        divergence = fmaf(p, u_s - u_t, divergence);
        score_s[m][n][e] = x;
      }
  }
  return fmaf(-kLn2, divergence, total_grad);
}

// kFormat: format of the student's tokens and of the score gradients. kFormatT: format of the teacher's tokens.
// kCausal: causal mask, with or without a prefix.
template <int kFormat, int kChunksT, int kFormatT, int kChunksS, bool kCausal>
struct SymmetricKernel {
  static_assert(kFormat == 1 || kFormat == kFloat16 || kFormat == kFloat32, "bfloat16, float16 or float32");
  static_assert(kFormatT == 1 || kFormatT == kFloat16 || kFormatT == kFloat32 || kChunksT == 0, "the same");
  using Shared = SymmetricLayout<kFormat, kChunksT, kFormatT, kChunksS>;
  static constexpr bool kExact = kFormat == kFloat32;
  static constexpr SymmetricSchedule kSchedule = symmetric_schedule(kFormat, kChunksT, kFormatT, kChunksS, kCapability);
  static constexpr int kStripRows = kSchedule.strip_rows;

  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    const Shared shared{memory};
    BlockState& state = shared.state();
    if (thread_index() == 0) find_work(params, state);
    syncthreads();
    const Call& call = params.call;
    const int width = state.relation->student.key.width;
    clear_padding(call, state.n, 0, call.positions,
                  state.relation->query_grad + (state.n * call.positions * call.num_heads + state.head) * width,
                  call.num_heads * width, width);
    if (state.sequence.length == 0) return;

    load(params, shared);
    const Range range_t = range_of_norms(shared.teacher(0), state.sequence.length, shared.chunks_t(), shared.format_t(),
                                         state.scale_t, shared.scratch());
    const Range range_s = range_of_norms(shared.student(0), state.sequence.length, shared.chunks_s(), kFormat,
                                         state.scale_s, shared.scratch());
    if (thread_index() == 0) {
      state.reference_t = middle_of(range_t);
      state.reference_s = middle_of(range_s);
    }
    syncthreads();
    double value = !shares_reference(state.sequence.length, range_t, range_s) ? row_wise(shared)
                   : kStripRows                                               ? strips(shared)
                                                                              : symmetric(shared);
    write(params, shared, block_sum(value, shared.scratch()));
  }

  static MINILM_DEVICE void find_work(const LaunchParams& params, BlockState& state) {
    find_head(params, block_index(), state);
    state.tiles = (state.sequence.length + kTile - 1) / kTile;
    state.grad_factor = 1.0f / grad_scale(kFormat);
    if (state.sequence.length == 0) *partial_of(params, state) = 0.0;
  }

  static MINILM_DEVICE double* partial_of(const LaunchParams& params, const BlockState& state) {
    return params.partials + state.relation->index * params.slots + params.first_slot +
           state.n * params.call.num_heads + state.head;
  }

  static MINILM_DEVICE void load(const LaunchParams& params, const Shared& shared) {
    const BlockState& state = shared.state();
    const int tokens = static_cast<int>(round_up(state.sequence.length, kStripRows ? kStripRows : kTile));
    load_tokens(state.relation->teacher.key, state.sequence, state.head, 0, tokens, shared.teacher(0),
                shared.chunks_t(), shared.format_t());
    load_tokens(state.relation->student.key, state.sequence, state.head, 0, tokens, shared.student(0),
                shared.chunks_s(), kFormat);
    if (shared.format_t() == kFloat32) {
      float* means = shared.grads(0);
      syncthreads();
      find_means(shared.teacher(0), state.sequence.length, shared.chunks_t(), means);
      syncthreads();
      subtract_means(shared.teacher(0), state.sequence.length, tokens, shared.chunks_t(), means, 0.0f,
                     [&](int i, int chunk, float (&value)[8]) {
                       add_splits(shared.teacher(0), i, chunk, shared.chunks_t(), value);
                     });
    }
    if (kFormat == kFloat32) {
      float* means = shared.grads(0);
      syncthreads();
      float most = find_means(shared.student(0), state.sequence.length, shared.chunks_s(), means);
      most = block_range({0.0f, most}, shared.scratch()).high;
      const uint32_t exponent = exponent_of(most);
      subtract_means(shared.student(0), state.sequence.length, tokens, shared.chunks_s(), means, token_factor(exponent),
                     [&](int i, int chunk, float (&value)[8]) {
                       add_splits(shared.student(0), i, chunk, shared.chunks_s(), value);
                     });
      if (thread_index() == 0) shared.state().grad_factor *= grad_factor(exponent);
    }
    if (shared.format_t() == kFloat32 || kFormat == kFloat32) syncthreads();
    for (int i = thread_index(); i < tokens; i += thread_count()) {
      shared.sums_t()[i] = shared.sums_s()[i] = 0.0f;
      for (int chunk = 0; chunk < shared.chunks_s(); ++chunk) {
        float* grad = shared.grads(i) + chunk * shared.grads_plane();
        store_uint4(grad, Uint4{});
        store_uint4(grad + 4, Uint4{});
      }
    }
    syncthreads();
  }

  static MINILM_DEVICE void write(const LaunchParams& params, const Shared& shared, double value) {
    const Call& call = params.call;
    const BlockState& state = shared.state();
    const Sequence& sequence = state.sequence;
    const float weight = weight_of(call, state.n);
    if (thread_index() == 0) *partial_of(params, state) = weight * value;
    const float factor = state.relation->student.scale * weight * state.grad_factor;
    const int width = state.relation->student.key.width, chunks = shared.chunks_s();
    const int64_t stride = call.num_heads * width;
    float* out = state.relation->query_grad + (sequence.batch * call.positions * call.num_heads + state.head) * width;
    for (int item = thread_index(); item < sequence.length * chunks; item += thread_count()) {
      int i = item / chunks, chunk = item % chunks;
      write_chunk(out + position_of(sequence, i) * stride, width, chunk, shared.grads(i) + chunk * shared.grads_plane(),
                  factor);
    }
  }

  static MINILM_DEVICE double strips(const Shared& shared) {
    if constexpr (kStripRows > 0) return Strips<Shared, kStripRows / 16, kChunksT, kChunksS, kCausal>::run(shared);
    return 0.0;
  }

  static MINILM_DEVICE double symmetric(const Shared& shared) {
    const BlockState& state = shared.state();
    for (int round = -1; round < rounds_of(state.tiles); ++round) {
      for (int k = warp_index(); k < pairs_of(state.tiles, round); k += thread_count() / 32) {
        const TilePair pair = tile_pair(state.tiles, round, k);
        if (pair.row < 0) continue;
        const PairTile tile{pair.row * kTile, pair.column * kTile};
        if (is_masked(tile, state.bound)) {
          // static: begin sums-masked
          add_tile_sums<true>(shared, tile);
          // static: end sums-masked
        } else {
          // static: begin sums
          add_tile_sums<false>(shared, tile);
          // static: end sums
        }
      }
      syncthreads();
    }

    CompensatedSum value;
    for (int i = thread_index(); i < state.tiles * kTile; i += thread_count()) {
      const bool counted = counts(state.sequence, i);
      float &l_t = shared.sums_t()[i], &l_s = shared.sums_s()[i];
      if (counted) value += kLn2 * log2_of_ratio(l_s, l_t);
      l_t = counted ? 1.0f / l_t : 0.0f;  // 0: every probability of the row is 0
      l_s = counted ? 1.0f / l_s : 0.0f;
    }
    syncthreads();

    for (int round = -1; round < rounds_of(state.tiles); ++round) {
      for (int k = warp_index(); k < pairs_of(state.tiles, round); k += thread_count() / 32) {
        const TilePair pair = tile_pair(state.tiles, round, k);
        if (pair.row < 0) continue;
        const PairTile tile{pair.row * kTile, pair.column * kTile};
        if (is_masked(tile, state.bound)) {
          // static: begin gradient-masked
          value += add_tile_gradients<true>(shared, tile);
          // static: end gradient-masked
        } else {
          // static: begin gradient
          value += add_tile_gradients<false>(shared, tile);
          // static: end gradient
        }
      }
      syncthreads();
    }
    return static_cast<double>(value.sum) + value.rest;
  }

  // Tiles on the diagonal, and tiles whose rows are partly below `bound`, need a mask per pair. Rows beyond the end of
  // the sequence are at or above `bound`, and their own sums are ignored.
  static MINILM_DEVICE bool is_masked(const PairTile& tile, int bound) {
    return tile.rows == tile.columns || (tile.rows < bound && tile.rows + kTile > bound);
  }

  template <bool kMasked>
  static MINILM_DEVICE void add_tile_sums(const Shared& shared, const PairTile& tile) {
    const BlockState& state = shared.state();
    float score[2][4][4];
    scores(score, shared.teacher(tile.rows), shared.teacher(tile.columns), shared.chunks_t(), shared.format_t());
    add_sums<kMasked, kCausal>(shared.sums_t(), score, state.scale_t, state.reference_t, tile, state.bound);
    scores(score, shared.student(tile.rows), shared.student(tile.columns), shared.chunks_s(), kFormat);
    add_sums<kMasked, kCausal>(shared.sums_s(), score, state.scale_s, state.reference_s, tile, state.bound);
  }

  template <bool kMasked>
  static MINILM_DEVICE float add_tile_gradients(const Shared& shared, const PairTile& tile) {
    const BlockState& state = shared.state();
    float value = 0.0f;
    MINILM_NO_UNROLL_FOR (int half = 0; half < 2; ++half) {
      const int columns = tile.columns + 16 * half;
      float score_t[2][2][4], score_s[2][2][4];
      scores(score_t, shared.teacher(tile.rows), shared.teacher(columns), shared.chunks_t(), shared.format_t());
      scores(score_s, shared.student(tile.rows), shared.student(columns), shared.chunks_s(), kFormat);
      value += find_score_grads<kMasked, kCausal>(score_t, score_s, state.scale_t, state.scale_s, state.reference_t,
                                                  state.reference_s, shared.sums_t(), shared.sums_s(), tile, half,
                                                  state.bound);
      add_gradients<kFormat, true>(score_s, shared.grads(tile.rows), shared.grads(columns), shared.grads_plane(),
                                   shared.student(tile.rows), shared.student(columns), shared.chunks_s());
    }
    return value;
  }

  // Fallback with a maximum per row, for short sequences and for ranges of s_ii that are too wide for one reference.
  static MINILM_DEVICE double row_wise(const Shared& shared) {
    const BlockState& state = shared.state();
    const int warps = thread_count() / 32;
    for (int tile = warp_index(); tile < state.tiles; tile += warps) {
      MINILM_NO_UNROLL_FOR (int student = 0; student < 2; ++student) {
        PerRow maximum, total;
        MINILM_UNROLL_FOR (int i = 0; i < 4; ++i) {
          maximum[i / 2][i % 2] = kNegInf;
          total[i / 2][i % 2] = 0.0f;
        }
        MINILM_NO_UNROLL_FOR (int other = 0; other < state.tiles; ++other) {
          float score[2][4][4];
          const Tokens rows = student ? shared.student(tile * kTile) : shared.teacher(tile * kTile);
          const Tokens columns = student ? shared.student(other * kTile) : shared.teacher(other * kTile);
          scores(score, rows, columns, student ? shared.chunks_s() : shared.chunks_t(),
                 student ? kFormat : shared.format_t());
          add_row_stats<kExact>(maximum, total, score, student ? state.scale_s : state.scale_t, state.sequence,
                                {tile * kTile, other * kTile});
        }
        const RowStats rows = shared.row_stats();
        write_row_stats<kExact>((student ? rows.log2_sum_s : rows.log2_sum_t) + tile * kTile,
                                (student ? rows.max_s : rows.max_t) + tile * kTile, maximum, total, state.sequence,
                                tile * kTile, kTile);
      }
    }
    syncthreads();
    double value = 0.0;
    for (int tile = warp_index(); tile < state.tiles; tile += warps) {
      PerRow kl = {}, key_grads = {};
      MINILM_NO_UNROLL_FOR (int other = 0; other < state.tiles; ++other) {
        const TileOperands all{shared.teacher(0), shared.student(0), shared.row_stats(), nullptr};
        row_wise_tile<kFormat, kExact, true, true>(at(all, tile * kTile), at(all, other * kTile), shared.chunks_t(),
                                                   shared.format_t(), shared.chunks_s(), kFormat, state.scale_t,
                                                   state.scale_s, state.sequence, {tile * kTile, other * kTile}, kl,
                                                   shared.grads(tile * kTile), shared.grads_plane(), key_grads);
      }
      MINILM_UNROLL_FOR (int i = 0; i < 4; ++i) value += kl[i / 2][i % 2];
    }
    return value;
  }
};

}  // namespace minilm::cuda
