// Building blocks of both paths: tokens in shared memory, scores of a 32 × 32 tile, and products with score gradients.
//
// Every product runs on tensor cores. A number is represented by bf16 splits: bfloat16 terms whose sum is exactly the
// number. A bfloat16 input has one split, float16 two, float32 three. Products of splits are exact in float32. The
// symmetric path multiplies float16 numbers as they are (kFloat16), which is exact as well.
//
// Tokens in shared memory: [split][chunk][token][8] 16-bit numbers. A chunk is 8 features, so that a token of a chunk
// takes 16 bytes, and 8 tokens take 128 contiguous bytes. Matrix loads are free of bank conflicts for every width.
//
// A warp holds a tile x[m][n][e] in the layout of mma accumulators: in lane 4g + t, x[m][n][e] belongs to row
// 16m + 8(e / 2) + g and column 8n + 2t + e % 2. A tile that needs the scores of teacher and student at the same time
// is processed in two halves of 16 columns, to save registers.
#pragma once

#include "launch_params.h"
#include "ptx.cuh"

namespace minilm::cuda {

MINILM_DEVICE int lane_index() { return thread_index() % 32; }
MINILM_DEVICE int warp_index() { return thread_index() / 32; }
MINILM_DEVICE int min_of(int x, int y) { return x < y ? x : y; }
MINILM_DEVICE int max_of(int x, int y) { return x > y ? x : y; }

MINILM_DEVICE int splits_of(DType dtype) { return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3; }
MINILM_DEVICE int format_of(DType dtype) {  // in the symmetric path
  return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? kFloat16 : kFloat32;
}
MINILM_DEVICE int splits_of(const ModelOperands& model) {
  return max_of(splits_of(model.query.dtype), splits_of(model.key.dtype));
}
MINILM_DEVICE int chunks_of(int width) { return (width + 7) / 8; }

// ---- Sequences --------------------------------------------------------------------------------------------------

struct Sequence {
  int64_t batch;          // index in padded tensors, 0 in packed ones
  int64_t first;          // index of its first token among the tokens of all sequences
  const int64_t* tokens;  // positions; null: token i has position `origin` + i
  int64_t origin;
  const bool* counted;  // by position: true on rows that count; null: all rows count
  int length;
  int prefix;  // row i sees the keys below max(i + 1, prefix)
};

MINILM_DEVICE int64_t start_of(const Call& call, int64_t n) {
  return call.starts ? call.starts[n] : n * call.positions;
}

// Returns false if `starts`, which may hold any numbers, does not describe a sequence of at most `max_length` tokens.
MINILM_DEVICE bool find_sequence(const Call& call, int64_t n, Sequence& sequence) {
  int64_t first = start_of(call, n);
  int64_t end = call.lengths ? first + call.lengths[n] : start_of(call, n + 1);
  int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  if (first < 0 || end < first || end > total || end - first > call.max_length) return false;
  sequence.batch = call.packed ? 0 : n;
  sequence.first = first;
  sequence.tokens = call.tokens ? call.tokens + first : nullptr;
  sequence.origin = call.packed ? first : 0;
  sequence.counted = call.query_mask ? call.query_mask + sequence.batch * call.positions : nullptr;
  sequence.length = static_cast<int>(end - first);
  sequence.prefix = sequence.length;
  if (call.causal) {
    int64_t prefix = call.prefixes ? call.prefixes[n] : 0;
    sequence.prefix = prefix < 0 ? 0 : prefix < sequence.length ? static_cast<int>(prefix) : sequence.length;
  }
  return true;
}

MINILM_DEVICE int64_t position_of(const Sequence& sequence, int token) {
  return sequence.tokens ? sequence.tokens[token] : sequence.origin + token;
}

// Weight of a sequence's rows. It is NaN in malformed packings.
MINILM_DEVICE float weight_of(const Call& call, int64_t n) { return call.weights ? call.weights[n] : call.weight; }

// Bound of the keys that row `row` sees: all keys below it.
MINILM_DEVICE int bound_of(const Sequence& sequence, int row) {
  return row < sequence.length ? max_of(row + 1, sequence.prefix) : 0;
}

// Rows that do not count have neither a loss nor a gradient. Their tokens are keys of other rows all the same.
MINILM_DEVICE bool counts(const Sequence& sequence, int row) {
  return row < sequence.length && (!sequence.counted || sequence.counted[position_of(sequence, row)]);
}

// ---- Loading ----------------------------------------------------------------------------------------------------

MINILM_DEVICE float load_feature(const TensorView& x, int64_t at) {
  if (x.dtype == DType::float32) return static_cast<const float*>(x.data)[at];
  uint32_t bits = static_cast<const uint16_t*>(x.data)[at];
  return x.dtype == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

// Loads the 8 features of a chunk of the token at offset `at`; features beyond the width are 0. Uses 16-byte loads if
// the address is aligned.
MINILM_DEVICE void load_chunk(const TensorView& x, int64_t at, int chunk, float (&value)[8]) {
  int size = x.dtype == DType::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(x.data) + (at + 8 * chunk) * size;
  if (x.feature_stride == 1 && 8 * chunk + 8 <= x.width && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    Uint4 low = load_uint4(from);
    if (x.dtype == DType::float32) {
      Uint4 high = load_uint4(from + 16);
      MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
        value[d] = as_float(low.word[d]);
        value[4 + d] = as_float(high.word[d]);
      }
    } else {
      MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
        uint32_t word = low.word[d];
        bool is_bfloat16 = x.dtype == DType::bfloat16;
        value[2 * d] = is_bfloat16 ? as_float(word << 16) : float16_to_float(word & 0xffffu);
        value[2 * d + 1] = is_bfloat16 ? as_float(word & 0xffff0000u) : float16_to_float(word >> 16);
      }
    }
    return;
  }
  MINILM_UNROLL_FOR (int d = 0; d < 8; ++d)
    value[d] = 8 * chunk + d < x.width ? load_feature(x, at + (8 * chunk + d) * x.feature_stride) : 0.0f;
}

MINILM_DEVICE float low_of(uint32_t packed) { return as_float(packed << 16); }
MINILM_DEVICE float high_of(uint32_t packed) { return as_float(packed & 0xffff0000u); }

// The tokens of a head in global memory.
struct HeadTokens {
  const TensorView& x;
  const Sequence& sequence;
  int64_t base;

  MINILM_DEVICE HeadTokens(const TensorView& view, const Sequence& of, int64_t head)
      : x(view), sequence(of), base(of.batch * view.batch_stride + head * view.head_stride) {}
  MINILM_DEVICE void operator()(int token, int chunk, float (&value)[8]) const {
    load_chunk(x, base + position_of(sequence, token) * x.position_stride, chunk, value);
  }
};

// Writes factor · sums to the features of a chunk of a token's gradient.
MINILM_DEVICE void write_chunk(float* out, int width, int chunk, const float* sums, float factor) {
  if (width % 4 == 0) {
    MINILM_UNROLL_FOR (int d = 0; d < 8; d += 4)
      if (8 * chunk + d < width) {
        Uint4 words = load_uint4(sums + d);
        MINILM_UNROLL_FOR (int k = 0; k < 4; ++k) words.word[k] = as_bits(as_float(words.word[k]) * factor);
        store_uint4(out + 8 * chunk + d, words);
      }
  } else {
    MINILM_UNROLL_FOR (int d = 0; d < 8; ++d)
      if (8 * chunk + d < width) out[8 * chunk + d] = sums[d] * factor;
  }
}

// Sets the gradient of a head to 0 at tokens first ... end - 1 of sequence n that are padding. `out`: gradient of the
// sequence's first position; `stride`: numbers per position.
MINILM_DEVICE void clear_padding(const Call& call, int64_t n, int64_t first, int64_t end, float* out, int64_t stride,
                                 int width) {
  if (!call.tokens || !call.lengths) return;
  first = first > call.lengths[n] ? first : call.lengths[n];
  end = end < call.positions ? end : call.positions;
  const int64_t* tokens = call.tokens + n * call.positions;
  for (int64_t item = first * width + thread_index(); item < end * width; item += thread_count())
    out[tokens[item / width] * stride + item % width] = 0.0f;
}

// One model's tokens in shared memory, beginning with the first token of a tile.
struct Tokens {
  const char* planes;
  int plane;
};
MINILM_DEVICE Tokens at(const Tokens& x, int token) { return {x.planes + token * 16, x.plane}; }

MINILM_DEVICE char* writable(const Tokens& x) { return const_cast<char*>(x.planes); }

// ---- Float32 tokens of self relations ---------------------------------------------------------------------------
//
// In trained models all tokens share features that are much larger than the others, and a score would round at the size
// of their squares. With the mean μ of the tokens, x̃ = x - μ and the offset b_i = μ·x̃_i,
//
//     x_i·x_j - |μ|² = x̃_i·x̃_j + b_i + b_j.
//
// The constant |μ|² changes no probability. The plane of offsets has two words for the three splits of b, and two of
// ones. The product of a row's words with those of a column, exchanged in pairs, is b_i + b_j.

// The 8 features of a chunk of a token, from three splits.
MINILM_DEVICE void add_splits(const Tokens& x, int token, int chunk, int chunks, float (&value)[8]) {
  MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) value[d] = 0.0f;
  MINILM_UNROLL_FOR (int split = 2; split >= 0; --split) {
    const Uint4 words = load_uint4(x.planes + (split * chunks + chunk) * x.plane + token * 16);
    MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
      value[2 * d] = add(value[2 * d], low_of(words.word[d]));
      value[2 * d + 1] = add(value[2 * d + 1], high_of(words.word[d]));
    }
  }
}

// Writes 8 numbers as bfloat16 or float16 splits to planes `stride` bytes apart. Overwrites them.
template <bool kHalf>
MINILM_DEVICE void write_splits(char* to, int stride, int splits, float (&value)[8]) {
  for (int split = 0; split < splits; ++split) {
    Uint4 words;
    MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
      float &low = value[2 * d], &high = value[2 * d + 1];
      const uint32_t word = words.word[d] = kHalf ? pack_float16(low, high) : pack_bfloat16(low, high);
      const Float2 taken = kHalf ? unpack_float16(word) : Float2{low_of(word), high_of(word)};
      low = sub(low, taken.x);
      high = sub(high, taken.y);
    }
    store_uint4(to + split * stride, words);
  }
}

// The mean of a feature of `length` tokens, or 0 if it is less than the feature's deviation from it: subtracting such a
// mean would only add rounding errors.
MINILM_DEVICE float useful_mean(float sum, float squares, int length) {
  const float mean = sum / static_cast<float>(length);
  return 2.0f * mean * sum > squares ? mean : 0.0f;
}

// Writes the useful mean of each feature to `means`. Returns to each thread the largest magnitude of the features that
// it has read.
MINILM_DEVICE float find_means(const Tokens& x, int length, int chunks, float* means) {
  float most = 0.0f;
  for (int chunk = warp_index(); chunk < chunks; chunk += thread_count() / 32) {
    float sum[8] = {}, squares[8] = {};
    for (int i = lane_index(); i < length; i += 32) {
      float value[8];
      add_splits(x, i, chunk, chunks, value);
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) {
        sum[d] += value[d];
        squares[d] = fmaf(value[d], value[d], squares[d]);
        most = fmaxf(most, fabsf(value[d]));
      }
    }
    MINILM_UNROLL_FOR (int mask = 16; mask > 0; mask /= 2)
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) {
        sum[d] += shuffle_xor(sum[d], mask);
        squares[d] += shuffle_xor(squares[d], mask);
      }
    if (lane_index() == 0)
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) means[8 * chunk + d] = useful_mean(sum[d], squares[d], length);
  }
  return most;
}

// Writes tokens less their means, as three splits, and their offsets. load(token, chunk, value): their 8 features. With
// `factor`, which is a power of two and not 0, also writes factor · x for the gradient.
template <class Load>
MINILM_DEVICE void subtract_means(const Tokens& to, int length, int capacity, int chunks, const float* means,
                                  float factor, const Load& load) {
  char* planes = writable(to);
  const int plane = to.plane, offsets = score_planes(kFloat32, chunks) - 1;
  for (int i = thread_index(); i < capacity; i += thread_count()) {
    float offset = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float value[8], scaled[8];
      load(i, chunk, value);
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) {
        scaled[d] = value[d] * factor;
        const float mean = i < length ? means[8 * chunk + d] : 0.0f;
        value[d] = sub(value[d], mean);
        offset = fmaf(value[d], mean, offset);
      }
      char* token = planes + i * 16 + chunk * plane;
      write_splits<false>(token, chunks * plane, 3, value);
      if (factor != 0.0f) write_splits<true>(token + (offsets + 1) * plane, chunks * plane, 2, scaled);
    }
    const float high = low_of(pack_bfloat16(offset, 0.0f)), rest = sub(offset, high);
    const uint32_t first = pack_bfloat16(high, rest);
    const uint32_t ones = i < length ? 0x3f803f80u : 0u;
    store_uint4(planes + offsets * plane + i * 16,
                {{first, pack_bfloat16(sub(rest, high_of(first)), 0.0f), ones, ones}});
  }
}

// As subtract_means, with `count` tokens from token `first` of the sequence on.
MINILM_DEVICE void subtract_means(const Tokens& to, const HeadTokens& load, int first, int count, int chunks,
                                  const float* means, float factor) {
  const int left = load.sequence.length - first;
  subtract_means(to, left, count, chunks, means, factor, [&](int i, int chunk, float (&value)[8]) {
    if (i < left)
      load(first + i, chunk, value);
    else
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) value[d] = 0.0f;
  });
}

// Tells whether chunks of tokens in global memory are aligned and have all their features in the kernel's format.
MINILM_DEVICE bool is_copyable(const TensorView& x, int64_t base, int format) {
  const DType copied = format == kFloat16 ? DType::float16 : DType::bfloat16;
  return splits_in(format) == 1 && x.dtype == copied && x.feature_stride == 1 && x.width % 8 == 0 &&
         x.position_stride % 8 == 0 && (reinterpret_cast<uintptr_t>(x.data) + base * 2) % 16 == 0;
}

// Loads `count` tokens of one head, from token `first` of the sequence on, with all threads of the block. Tokens beyond
// the end of the sequence are 0 and, with `rows`, those of rows that do not count. `means`, if given, are subtracted
// from the others; with kFloat32, the tokens then also get offsets, and `rows` is not supported. Neighbouring threads
// load the chunks of a token, then those of the next token. One head of a token may be as small as 16 bytes; blocks of
// neighbouring heads run at the same time and share the sectors in L2.
MINILM_DEVICE void load_tokens(const TensorView& x, const Sequence& sequence, int64_t head, int first, int count,
                               const Tokens& to, int chunks, int format, bool rows = false,
                               const float* means = nullptr) {
  if (format == kFloat32 && means)
    return subtract_means(to, HeadTokens(x, sequence, head), first, count, chunks, means, 0.0f);
  char* planes = writable(to);
  const int plane = to.plane;
  int64_t base = sequence.batch * x.batch_stride + head * x.head_stride;
  if (is_copyable(x, base, format)) {
    const char* from = static_cast<const char*>(x.data) + base * 2;
    for (int item = thread_index(); item < count * chunks; item += thread_count()) {
      const int slot = item / chunks, chunk = item % chunks, token = first + slot;
      const bool exists = rows ? counts(sequence, token) : token < sequence.length;
      const int64_t offset = exists ? position_of(sequence, token) * x.position_stride + 8 * chunk : 0;
      copy_or_clear(planes + chunk * plane + slot * 16, from + offset * 2, exists);
    }
    return wait_for_copies();
  }
  for (int item = thread_index(); item < count * chunks; item += thread_count()) {
    int slot = item / chunks, chunk = item % chunks;
    float value[8] = {};
    if (rows ? counts(sequence, first + slot) : first + slot < sequence.length) {
      load_chunk(x, base + position_of(sequence, first + slot) * x.position_stride, chunk, value);
      if (means)
        MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) value[d] = sub(value[d], means[8 * chunk + d]);
    }
    char* to = planes + chunk * plane + slot * 16;
    for (int split = 0; split < splits_in(format); ++split) {
      Uint4 words;
      MINILM_UNROLL_FOR (int d = 0; d < 4; ++d) {
        words.word[d] = format == kFloat16 ? pack_float16(value[2 * d], value[2 * d + 1])
                                           : pack_bfloat16(value[2 * d], value[2 * d + 1]);
        value[2 * d] = sub(value[2 * d], low_of(words.word[d]));
        value[2 * d + 1] = sub(value[2 * d + 1], high_of(words.word[d]));
      }
      store_uint4(to + split * chunks * plane, words);
    }
  }
}

// Row and column, within a tile, of a lane's element x[m][n][e]; half = e / 2.
MINILM_DEVICE int own_row(int m, int half) { return 16 * m + 8 * half + lane_index() / 4; }
MINILM_DEVICE int other_column(int n, int e) { return 8 * n + lane_index() % 4 * 2 + e % 2; }

// ---- Scores -----------------------------------------------------------------------------------------------------

// c += a · b for numbers of a format.
MINILM_DEVICE void multiply_add(int format, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if (format == kFloat16)
    mma_m16n8k8<true>(c, a0, a1, b0);
  else
    mma_m16n8k8(c, a0, a1, b0);
}
MINILM_DEVICE void multiply_add(int format, float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  if (format == kFloat16)
    mma_m16n8k16<true>(c, a[0], a[1], a[2], a[3], b0, b1);
  else
    mma_m16n8k16(c, a[0], a[1], a[2], a[3], b0, b1);
}

MINILM_DEVICE void add_to(float (&sum)[4], const float (&part)[4]) {
  MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) sum[e] = add(sum[e], part[e]);
}

// Scores x_i · y_j of 32 rows and 8·kColumns columns. Split a of x is multiplied with split b of y if a + b <= 2, small
// products first. The omitted products are below 2^-24 |x_i| |y_j|. mma truncates its sums. For three splits, the large
// products are therefore summed separately and added with rounding. kFloat32: scores minus |μ|².
template <int kColumns>
MINILM_DEVICE void scores(float (&out)[2][kColumns][4], const Tokens& rows, const Tokens& columns, int chunks,
                          int format) {
  static_assert(kColumns == 2 || kColumns == 4, "two or four tiles of 8 columns");
  MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
    MINILM_UNROLL_FOR (int n = 0; n < kColumns; ++n)
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
  // One ldmatrix loads 16 rows, or 16 columns, of two chunks.
  const int lane = lane_index(), splits = splits_in(format);
  const int row_at = lane % 16 * 16 + lane / 16 * rows.plane;
  const int column_at = (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * columns.plane;
  int level = splits == 1 ? 0 : 2;
  if (splits == 2 && chunks > 4) hide_value(level);  // unrolled, the products of so wide tokens spill on sm_100
  for (; level >= 0; --level)
    for (int a = max_of(0, level - splits + 1); a <= min_of(level, splits - 1); ++a) {
      const char* x = rows.planes + a * chunks * rows.plane;
      const char* y = columns.planes + (level - a) * chunks * columns.plane;
      int chunk = 0;
      for (; chunk + 1 < chunks; chunk += 2) {
        uint32_t row[2][4], column[kColumns / 2][4];
        MINILM_UNROLL_FOR (int m = 0; m < 2; ++m) ldmatrix_x4(row[m], x + chunk * rows.plane + 256 * m + row_at);
        MINILM_UNROLL_FOR (int n = 0; n < kColumns / 2; ++n)
          ldmatrix_x4(column[n], y + chunk * columns.plane + 256 * n + column_at);
        MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
          MINILM_UNROLL_FOR (int n = 0; n < kColumns; ++n) {
            const uint32_t* first = column[n / 2] + 2 * (n % 2);
            if (splits == 3 && level == 0) {
              float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
              multiply_add(format, part, row[m], first[0], first[1]);
              add_to(out[m][n], part);
            } else {
              multiply_add(format, out[m][n], row[m], first[0], first[1]);
            }
          }
      }
      // The last of an odd number of chunks: 32 rows, and 32 columns or the same 16 columns twice.
      if (chunk < chunks) {
        uint32_t row[4], column[4];
        ldmatrix_x4(row, x + chunk * rows.plane + lane * 16);
        ldmatrix_x4(column, y + chunk * columns.plane + lane % (8 * kColumns) * 16);
        MINILM_UNROLL_FOR (int m = 0; m < 2; ++m)
          MINILM_UNROLL_FOR (int n = 0; n < kColumns; ++n) {
            if (format == kFloat32 && level == 0) {
              float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
              multiply_add(format, part, row[2 * m], row[2 * m + 1], column[n]);
              add_to(out[m][n], part);
            } else {
              multiply_add(format, out[m][n], row[2 * m], row[2 * m + 1], column[n]);
            }
          }
      }
    }
  if (format == kFloat32) {
    const int offsets = score_planes(format, chunks) - 1;
    const char* column = columns.planes + offsets * columns.plane + lane / 4 * 16 + (lane ^ 2) % 4 * 4;
    uint32_t row[4];
    ldmatrix_x4(row, rows.planes + offsets * rows.plane + lane * 16);
    MINILM_UNROLL_FOR (int n = 0; n < kColumns; ++n)
      MINILM_UNROLL_FOR (int m = 0; m < 2; ++m) {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_m16n8k8(part, row[2 * m], row[2 * m + 1], load_word(column + 128 * n));
        add_to(out[m][n], part);
      }
  }
}

// ---- Gradients --------------------------------------------------------------------------------------------------

// Score gradients M of half a tile (32 × 16), or their transpose, as the first operand of mma: [16-row tiles][16-column
// steps].
template <int kTiles>
using ScoreGrads = uint32_t[kTiles][2 / kTiles][4];

// Writes the leading split of M to `split`. With kRest, m keeps the remainder.
template <int kFormat, bool kRest>
MINILM_DEVICE void take_split(ScoreGrads<2>& split, float (&m)[2][2][4]) {
  MINILM_UNROLL_FOR (int i = 0; i < 2; ++i)
    MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) {
      float& low = m[i][q / 2][2 * (q % 2)];
      float& high = m[i][q / 2][2 * (q % 2) + 1];
      const uint32_t word = split[i][0][q] = kFormat >= kFloat16 ? pack_float16(low, high) : pack_bfloat16(low, high);
      if (kRest) {
        const Float2 taken = kFormat >= kFloat16 ? unpack_float16(word) : Float2{low_of(word), high_of(word)};
        low = sub(low, taken.x);
        high = sub(high, taken.y);
      }
    }
}

MINILM_DEVICE void transpose(ScoreGrads<1>& out, const ScoreGrads<2>& in) {
  MINILM_UNROLL_FOR (int k = 0; k < 2; ++k)
    MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) out[0][k][q] = movmatrix(in[k][0][q / 2 + 2 * (q % 2)]);
}

// sums[chunk][token][8] += m · x, in a format, with the splits 0 ... kSplits - 1 of x. `sums` begins with the tile's
// first token; a chunk has `plane` floats. With kSeparate, the products are summed separately and added with rounding
// to nearest, which mma does not do.
template <int kFormat, int kSplits, bool kSeparate, int kTiles>
MINILM_DEVICE void add_products(float* sums, int plane, const ScoreGrads<kTiles>& m, const Tokens& x, int chunks) {
  constexpr int kSteps = 2 / kTiles;
  const int lane = lane_index();
  const char* token = x.planes + lane % (16 * kSteps) * 16;
  if (kFormat == kFloat32) token += score_planes(kFormat, chunks) * x.plane;
  constexpr int kProducts = kFormat == kFloat32 ? kFloat16 : kFormat;
  sums += lane / 4 * 8 + lane % 4 * 2;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t y[kSplits][4];
    MINILM_UNROLL_FOR (int split = 0; split < kSplits; ++split)
      ldmatrix_x4_trans(y[split], token + (split * chunks + chunk) * x.plane);
    MINILM_UNROLL_FOR (int i = 0; i < kTiles; ++i) {
      float* out = sums + chunk * plane + i * 128;
      Float2 upper = load_float2(out), lower = load_float2(out + 64);
      float sum[4] = {upper.x, upper.y, lower.x, lower.y};
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float (&to)[4] = kSeparate ? part : sum;
      MINILM_UNROLL_FOR (int split = kSplits - 1; split >= 0; --split)
        MINILM_UNROLL_FOR (int k = 0; k < kSteps; ++k)
          multiply_add(kProducts, to, m[i][k], y[split][2 * k], y[split][2 * k + 1]);
      if (kSeparate)
        MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) sum[e] = add(sum[e], part[e]);
      store_float2(out, sum[0], sum[1]);
      store_float2(out + 64, sum[2], sum[3]);
    }
  }
}

// row_sums += M · columns and, with kColumns, column_sums += Mᵀ · rows, times grad_scale(kFormat). kFormat: format of
// the student's tokens and of M. Split a of M is multiplied with split b of the tokens if a + b is less than the number
// of splits. Overwrites m.
template <int kFormat, bool kColumns, int kSplit = 0>
MINILM_DEVICE void add_gradients(float (&m)[2][2][4], float* row_sums, float* column_sums, int plane,
                                 const Tokens& rows, const Tokens& columns, int chunks) {
  constexpr int kSplits = grad_splits_in(kFormat);
  constexpr float kScale = grad_scale(kFormat);
  if (kSplit == 0 && kScale != 1.0f)
    MINILM_UNROLL_FOR (int i = 0; i < 2; ++i)
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) m[i][n][e] *= kScale;
  ScoreGrads<2> split;
  take_split<kFormat, (kSplit + 1 < kSplits)>(split, m);
  add_products<kFormat, kSplits - kSplit, (kSplits > 1), 2>(row_sums, plane, split, columns, chunks);
  if (kColumns) {
    ScoreGrads<1> mirrored;
    transpose(mirrored, split);
    add_products<kFormat, kSplits - kSplit, (kSplits > 1), 1>(column_sums, plane, mirrored, rows, chunks);
  }
  if constexpr (kSplit + 1 < kSplits)
    add_gradients<kFormat, kColumns, kSplit + 1>(m, row_sums, column_sums, plane, rows, columns, chunks);
}

// ---- Sums -------------------------------------------------------------------------------------------------------

MINILM_DEVICE float log2_of_ratio(float x, float y) {
  float ratio = x / y;
  return ratio > 1e-30f && ratio < 1e30f ? log2f(ratio) : log2f(x) - log2f(y);
}

// Sums x[k] over a group of kCount lanes, whose indices differ in the bits from `bit` on. Each lane of the group
// receives the sum of one k, which is the number in these bits of its index.
template <int kCount>
MINILM_DEVICE float distributed_sums(float (&x)[kCount], int bit) {
  MINILM_UNROLL_FOR (int count = kCount / 2; count > 0; count /= 2) {
    bool upper = (lane_index() & (bit * count)) != 0;
    MINILM_UNROLL_FOR (int k = 0; k < count; ++k) {
      float keep = upper ? x[count + k] : x[k], give = upper ? x[k] : x[count + k];
      x[k] = keep + shuffle_xor(give, bit * count);
    }
  }
  return x[0];
}

// Compensated summation: `rest` collects the rounding errors of `sum`.
struct CompensatedSum {
  float sum = 0.0f, rest = 0.0f;
  MINILM_DEVICE void operator+=(float x) {
    float next = add(sum, x);
    float part = sub(next, sum);
    rest = add(rest, add(sub(sum, sub(next, part)), sub(x, part)));
    sum = next;
  }
};

// Returns the sum of x over the threads of a block to every thread. The order of additions depends only on the number
// of threads. `scratch`: one double per warp.
MINILM_DEVICE double block_sum(double x, double* scratch) {
  MINILM_UNROLL_FOR (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  syncthreads();
  if (lane_index() == 0) scratch[warp_index()] = x;
  syncthreads();
  x = 0.0;
  for (int w = 0; w < thread_count() / 32; ++w) x += scratch[w];
  return x;
}

}  // namespace minilm::cuda
