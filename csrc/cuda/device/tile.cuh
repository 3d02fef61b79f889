// What both kernels are built from: tokens in shared memory, 32 × 32 scores of a warp, and products with an excess M.
//
// Tokens lie in shared memory as [piece][chunk][token][8] bfloat16: chunks of 8 features, 16 bytes a token, so that 8
// tokens of a chunk are 128 bytes in a row and matrix loads meet no bank twice, whatever the width. A bfloat16 input is
// one piece; float16 is the exact sum of two, float32 of three. Products of pieces are exact in float32.
//
// Within a warp, lane 4g + t holds of a tile of pairs, as x[m][n][e], row 16m + 8(e / 2) + g and column 8n + 2t + e % 2:
// that of mma's accumulators. Where teacher and student are needed at once, a tile is taken in halves of 16 columns.
#pragma once

#include "batch.h"
#include "device.cuh"

namespace minilm::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

MINILM_DEVICE int lane_index() { return thread_index() % 32; }
MINILM_DEVICE int warp_index() { return thread_index() / 32; }
MINILM_DEVICE int smaller(int x, int y) { return x < y ? x : y; }
MINILM_DEVICE int larger(int x, int y) { return x > y ? x : y; }

MINILM_DEVICE int pieces_of(Type type) { return type == Type::bfloat16 ? 1 : type == Type::float16 ? 2 : 3; }
MINILM_DEVICE int chunks_of(int width) { return (width + 7) / 8; }

// ---- Sequences --------------------------------------------------------------------------------------------------

struct Sequence {
  int64_t batch;          // its place in dense tensors
  int64_t first;          // of its tokens among all real ones
  const int64_t* tokens;  // positions
  int length;
  int prefix;             // row i sees the keys below max(i + 1, prefix)
};

// False where `starts`, which may be any numbers, do not describe a sequence of at most `longest` tokens.
MINILM_DEVICE bool find_sequence(const Common& call, int64_t n, Sequence& sequence) {
  int64_t first = call.starts[n], end = call.starts[n + 1];
  int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  if (first < 0 || end < first || end > total || end - first > call.longest) return false;
  sequence.batch = call.packed ? 0 : n;
  sequence.first = first;
  sequence.tokens = call.tokens + first;
  sequence.length = static_cast<int>(end - first);
  sequence.prefix = sequence.length;
  if (call.causal) {
    int64_t prefix = call.prefixes ? call.prefixes[n] : 0;
    sequence.prefix = prefix < 0 ? 0 : prefix < sequence.length ? static_cast<int>(prefix) : sequence.length;
  }
  return true;
}

// Row i sees the keys below this.
MINILM_DEVICE int bound_of(const Sequence& sequence, int row) {
  return row < sequence.length ? larger(row + 1, sequence.prefix) : 0;
}

// ---- Loading ----------------------------------------------------------------------------------------------------

MINILM_DEVICE float half_to_float(uint32_t bits) {
  uint32_t magnitude = bits & 0x7fffu;
  float value = magnitude < 0x7c00u ? as_float(magnitude << 13) * 0x1p112f : as_float(0x7f800000u | magnitude << 13);
  return bits & 0x8000u ? -value : value;
}

MINILM_DEVICE float load_feature(const Matrix& x, int64_t at) {
  if (x.type == Type::float32) return static_cast<const float*>(x.data)[at];
  uint32_t bits = static_cast<const uint16_t*>(x.data)[at];
  return x.type == Type::bfloat16 ? as_float(bits << 16) : half_to_float(bits);
}

// Features 8·chunk … of the token at `at` (elements), beyond the width zeros; in 16-byte loads where they are aligned.
MINILM_DEVICE void load_chunk(const Matrix& x, int64_t at, int chunk, float (&value)[8]) {
  int size = x.type == Type::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(x.data) + (at + 8 * chunk) * size;
  if (x.feature == 1 && 8 * chunk + 8 <= x.width && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    Words low = load_words(from);
    if (x.type == Type::float32) {
      Words high = load_words(from + 16);
      MINILM_UNROLL for (int d = 0; d < 4; ++d) {
        value[d] = as_float(low.word[d]);
        value[4 + d] = as_float(high.word[d]);
      }
    } else {
      MINILM_UNROLL for (int d = 0; d < 4; ++d) {
        uint32_t word = low.word[d];
        bool brain = x.type == Type::bfloat16;
        value[2 * d] = brain ? as_float(word << 16) : half_to_float(word & 0xffffu);
        value[2 * d + 1] = brain ? as_float(word & 0xffff0000u) : half_to_float(word >> 16);
      }
    }
    return;
  }
  MINILM_UNROLL for (int d = 0; d < 8; ++d)
    value[d] = 8 * chunk + d < x.width ? load_feature(x, at + (8 * chunk + d) * x.feature) : 0.0f;
}

MINILM_DEVICE float low_of(uint32_t packed) { return as_float(packed << 16); }
MINILM_DEVICE float high_of(uint32_t packed) { return as_float(packed & 0xffff0000u); }

// The whole block loads `count` tokens of one head, from the sequence's token `first` on, to planes of `plane` bytes;
// beyond the sequence's end zeros. A row of a head may be no more than 16 bytes: neighbouring chunks, then tokens, go
// to neighbouring threads, and blocks of neighbouring heads run side by side, so that they share what L2 has fetched.
MINILM_DEVICE void load_tokens(const Matrix& x, const Sequence& sequence, int64_t head, int first, int count,
                               char* planes, int plane, int chunks, int pieces) {
  int64_t base = sequence.batch * x.batch + head * x.head;
  for (int item = thread_index(); item < count * chunks; item += thread_count()) {
    int slot = item / chunks, chunk = item % chunks;
    float value[8] = {};
    if (first + slot < sequence.length)
      load_chunk(x, base + sequence.tokens[first + slot] * x.position, chunk, value);
    char* to = planes + chunk * plane + slot * 16;
    for (int piece = 0; piece < pieces; ++piece) {
      Words words;
      MINILM_UNROLL for (int d = 0; d < 4; ++d) {
        words.word[d] = pack_bfloat16(value[2 * d], value[2 * d + 1]);
        value[2 * d] = sub(value[2 * d], low_of(words.word[d]));
        value[2 * d + 1] = sub(value[2 * d + 1], high_of(words.word[d]));
      }
      store_words(to + piece * chunks * plane, words);
    }
  }
}

// factor · sums to features 8·chunk … of a token's gradient.
MINILM_DEVICE void write_chunk(float* out, int width, int chunk, const float* sums, float factor) {
  if (width % 4 == 0) {
    MINILM_UNROLL for (int d = 0; d < 8; d += 4)
      if (8 * chunk + d < width) {
        Words words = load_words(sums + d);
        MINILM_UNROLL for (int k = 0; k < 4; ++k) words.word[k] = as_bits(as_float(words.word[k]) * factor);
        store_words(out + 8 * chunk + d, words);
      }
  } else {
    MINILM_UNROLL for (int d = 0; d < 8; ++d)
      if (8 * chunk + d < width) out[8 * chunk + d] = sums[d] * factor;
  }
}

// ---- Scores -----------------------------------------------------------------------------------------------------

// One model's tokens in shared memory, from a tile's first token on.
struct Tokens {
  const char* planes;
  int plane;
};
MINILM_DEVICE Tokens at(const Tokens& x, int token) { return {x.planes + token * 16, x.plane}; }

MINILM_DEVICE char* writable(const Tokens& x) { return const_cast<char*>(x.planes); }

// x_i · y_j of 32 rows and 8·kColumns columns. Of split inputs the products of pieces whose places add up to at most 2
// are summed, small ones first: what is left out is below 2^-24 of |x_i| |y_j|. mma cuts sums off where it should round:
// of float32 inputs the large products join the sum by additions.
template <int kColumns>
MINILM_DEVICE void scores(float (&out)[2][kColumns][4], const Tokens& rows, const Tokens& columns, int chunks,
                          int pieces) {
  static_assert(kColumns == 2 || kColumns == 4, "one load of matrices a step, or two");
  MINILM_UNROLL for (int m = 0; m < 2; ++m)
    MINILM_UNROLL for (int n = 0; n < kColumns; ++n)
      MINILM_UNROLL for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
  // One load brings a whole operand: of 16 rows, or of 16 columns, two chunks.
  const int lane = lane_index();
  const int row_at = lane % 16 * 16 + lane / 16 * rows.plane;
  const int column_at = (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * columns.plane;
  for (int level = pieces == 1 ? 0 : 2; level >= 0; --level)
    for (int a = larger(0, level - pieces + 1); a <= smaller(level, pieces - 1); ++a) {
      const char* x = rows.planes + a * chunks * rows.plane;
      const char* y = columns.planes + (level - a) * chunks * columns.plane;
      int chunk = 0;
      for (; chunk + 1 < chunks; chunk += 2) {
        uint32_t row[2][4], column[kColumns / 2][4];
        MINILM_UNROLL for (int m = 0; m < 2; ++m) load_matrices(row[m], x + chunk * rows.plane + 256 * m + row_at);
        MINILM_UNROLL for (int n = 0; n < kColumns / 2; ++n)
          load_matrices(column[n], y + chunk * columns.plane + 256 * n + column_at);
        MINILM_UNROLL for (int m = 0; m < 2; ++m)
          MINILM_UNROLL for (int n = 0; n < kColumns; ++n) {
            const uint32_t* first = column[n / 2] + 2 * (n % 2);
            if (pieces == 3 && level == 0) {
              float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
              multiply(part, row[m][0], row[m][1], row[m][2], row[m][3], first[0], first[1]);
              MINILM_UNROLL for (int e = 0; e < 4; ++e) out[m][n][e] = add(out[m][n][e], part[e]);
            } else {
              multiply(out[m][n], row[m][0], row[m][1], row[m][2], row[m][3], first[0], first[1]);
            }
          }
      }
      if (chunk < chunks) {  // 32 rows; 32 columns, or twice the same 16
        uint32_t row[4], column[4];
        load_matrices(row, x + chunk * rows.plane + lane * 16);
        load_matrices(column, y + chunk * columns.plane + lane % (8 * kColumns) * 16);
        MINILM_UNROLL for (int m = 0; m < 2; ++m)
          MINILM_UNROLL for (int n = 0; n < kColumns; ++n) multiply(out[m][n], row[2 * m], row[2 * m + 1], column[n]);
      }
    }
}

// ---- Products with M --------------------------------------------------------------------------------------------

// Half a tile of M, 32 × 16, or its transpose, as mma's first operand: [tiles of 16 rows][steps of 16 columns].
template <int kTiles>
using Excess = uint32_t[kTiles][2 / kTiles][4];

// The leading bfloat16 piece of M; with kRest, M keeps what is left of it.
template <bool kRest>
MINILM_DEVICE void take_piece(Excess<2>& piece, float (&m)[2][2][4]) {
  MINILM_UNROLL for (int i = 0; i < 2; ++i)
    MINILM_UNROLL for (int q = 0; q < 4; ++q) {
      float& low = m[i][q / 2][2 * (q % 2)];
      float& high = m[i][q / 2][2 * (q % 2) + 1];
      piece[i][0][q] = pack_bfloat16(low, high);
      if (kRest) {
        low = sub(low, low_of(piece[i][0][q]));
        high = sub(high, high_of(piece[i][0][q]));
      }
    }
}

MINILM_DEVICE void transpose(Excess<1>& out, const Excess<2>& in) {
  MINILM_UNROLL for (int k = 0; k < 2; ++k)
    MINILM_UNROLL for (int q = 0; q < 4; ++q) out[0][k][q] = transpose_matrix(in[k][0][q / 2 + 2 * (q % 2)]);
}

// sums[chunk][token][8] += m · x: `sums` from the first token on, `plane` floats a chunk. Of x the pieces 0 … kPieces − 1.
// Split products are added up apart and join the sums rounded to nearest, which mma does not do.
template <int kPieces, bool kApart, int kTiles>
MINILM_DEVICE void add_products(float* sums, int plane, const Excess<kTiles>& m, const Tokens& x, int chunks) {
  constexpr int kSteps = 2 / kTiles;
  const int lane = lane_index();
  const char* token = x.planes + lane % (16 * kSteps) * 16;
  sums += lane / 4 * 8 + lane % 4 * 2;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t y[kPieces][4];
    MINILM_UNROLL for (int piece = 0; piece < kPieces; ++piece)
      load_matrices_transposed(y[piece], token + (piece * chunks + chunk) * x.plane);
    MINILM_UNROLL for (int i = 0; i < kTiles; ++i) {
      float* low = sums + chunk * plane + i * 128;
      Pair before = load_pair(low), behind = load_pair(low + 64);
      float sum[4] = {before.x, before.y, behind.x, behind.y};
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float(&to)[4] = kApart ? part : sum;
      MINILM_UNROLL for (int piece = kPieces - 1; piece >= 0; --piece)
        MINILM_UNROLL for (int k = 0; k < kSteps; ++k)
          multiply(to, m[i][k][0], m[i][k][1], m[i][k][2], m[i][k][3], y[piece][2 * k], y[piece][2 * k + 1]);
      if (kApart) MINILM_UNROLL for (int e = 0; e < 4; ++e) sum[e] = add(sum[e], part[e]);
      store_pair(low, sum[0], sum[1]);
      store_pair(low + 64, sum[2], sum[3]);
    }
  }
}

// M times the columns' tokens to the rows' sums and, with kColumns, transposed, times the rows' tokens to the columns'
// sums. kPieces: of the student's tokens and of M; products of pieces whose places add up to less count. Destroys m.
template <int kPieces, bool kColumns, int kPiece = 0>
MINILM_DEVICE void add_gradients(float (&m)[2][2][4], float* row_sums, float* column_sums, int plane,
                                 const Tokens& rows, const Tokens& columns, int chunks) {
  Excess<2> piece;
  take_piece<(kPiece + 1 < kPieces)>(piece, m);
  add_products<kPieces - kPiece, (kPieces > 1), 2>(row_sums, plane, piece, columns, chunks);
  if (kColumns) {
    Excess<1> mirrored;
    transpose(mirrored, piece);
    add_products<kPieces - kPiece, (kPieces > 1), 1>(column_sums, plane, mirrored, rows, chunks);
  }
  if constexpr (kPiece + 1 < kPieces)
    add_gradients<kPieces, kColumns, kPiece + 1>(m, row_sums, column_sums, plane, rows, columns, chunks);
}

// ---- Sums -------------------------------------------------------------------------------------------------------

// A running sum whose rounding errors are kept beside it.
struct ExactSum {
  float sum = 0.0f, rest = 0.0f;
  MINILM_DEVICE void operator+=(float x) {
    float next = add(sum, x);
    float part = sub(next, sum);
    rest = add(rest, add(sub(sum, sub(next, part)), sub(x, part)));
    sum = next;
  }
};

// Adds x over the block's threads, in an order that depends on their number alone; every thread gets the sum. Needs one
// double a warp and one more.
MINILM_DEVICE double sum_of_block(double x, double* scratch) {
  MINILM_UNROLL for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  sync_block();
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
  x = 0.0;
  for (int w = 0; w < thread_count() / 32; ++w) x += scratch[w];
  return x;
}

}  // namespace minilm::cuda
