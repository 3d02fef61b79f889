// The kernels, written once over a vector F of V floats. The mathematics is derived in docs/mathematics.md; the cost
// of each step is counted in docs/cpu.md. Everything has internal linkage: no function compiled for one instruction
// set may be picked by the linker for another.

#include <cmath>
#include <type_traits>

#include "kernels.h"

namespace {

using namespace minilm::cpu;

constexpr int R = kStripRows;
constexpr int kGroup = V < R ? V : R;   // rows of a strip that lie in one block
constexpr int64_t kPanelBlocks = 16;    // blocks of keys between two visits of a row's accumulators
constexpr int kSumRows = 4;             // rows whose sums are kept in registers
constexpr float kHidden = -1e30f;       // score of a key that a row does not see: its exponential is 0
constexpr float kLn2 = 0.693147180559945309f;

static_assert(R % kTileRows == 0 && R % kSumRows == 0 && kGroup % kTileRows == 0, "");

// 2^x: minimax polynomials of 2^r for |r| <= 1/2 with p(0) = 1; relative errors 2e-8 and 1.1e-7 before rounding.
INLINE F exp2_of(F x) {
  Split s = split(x);
  F p = fma(all(1.53533619e-4f), s.rest, all(1.33988744e-3f));
  p = fma(p, s.rest, all(9.61843736e-3f));
  p = fma(p, s.rest, all(5.55033247e-2f));
  p = fma(p, s.rest, all(2.40226479e-1f));
  p = fma(p, s.rest, all(6.93147203e-1f));
  p = fma(p, s.rest, all(1.0f));
  return times_power(p, s, x);
}

INLINE F fast_exp2_of(F x) {
  Split s = split(x);
  F p = fma(all(1.32647272e-3f), s.rest, all(9.67151264e-3f));
  p = fma(p, s.rest, all(5.55073374e-2f));
  p = fma(p, s.rest, all(2.40222421e-1f));
  p = fma(p, s.rest, all(6.93146978e-1f));
  p = fma(p, s.rest, all(1.0f));
  return times_power(p, s, x);
}

INLINE const float* row_of(const float* x, int64_t width, int64_t row) { return x + row / V * width * V + row % V; }

// ---- Products -------------------------------------------------------------------------------------------------

// out[block][row][lane] = init + Σ_d x_row,d · y_d: a register tile of kTileRows × N blocks.
template <int N>
INLINE void score_tile(const float* row, const float* keys, int64_t width, F init, float* out) {
  F acc[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = init;
  for (int64_t d = 0; d < width; ++d) {
    F key[N];
    for (int n = 0; n < N; ++n) key[n] = load(keys + (n * width + d) * V);
    for (int r = 0; r < kTileRows; ++r) {
      F x = all(row[d * V + r]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, key[n], acc[r][n]);
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) store(out + (n * R + r) * V, acc[r][n]);
}

// Scores of the strip that starts at row `first` against `blocks` blocks of keys.
void scores(const float* queries, int64_t first, const float* keys, int64_t width, int64_t blocks, float init,
            float* out) {
  for (int64_t b = 0; b < blocks;) {
    const float* key = keys + b * width * V;
    float* o = out + b * R * V;
    bool wide = b + kTileBlocks <= blocks;
    for (int r = 0; r < R; r += kTileRows) {
      const float* row = row_of(queries, width, first + r);
      if (wide)
        score_tile<kTileBlocks>(row, key, width, all(init), o + r * V);
      else
        score_tile<1>(row, key, width, all(init), o + r * V);
    }
    b += wide ? kTileBlocks : 1;
  }
}

template <int N>
INLINE void key_tile(const float* m, const float* const* rows, int64_t width, float* grads) {
  F factor[N][R];
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) factor[n][r] = load(m + (n * R + r) * V);
  for (int64_t d = 0; d < width; ++d) {
    F acc[N];
    for (int n = 0; n < N; ++n) acc[n] = load(grads + (n * width + d) * V);
    for (int r = 0; r < R; ++r) {
      F x = all(rows[r / kGroup][d * V + r % kGroup]);
      for (int n = 0; n < N; ++n) acc[n] = fma(factor[n][r], x, acc[n]);
    }
    for (int n = 0; n < N; ++n) store(grads + (n * width + d) * V, acc[n]);
  }
}

// grads[block][d] += Σ_row m[block][row] · x_row,d
void key_gradient(const float* m, const float* queries, int64_t first, int64_t width, int64_t blocks, float* grads) {
  const float* rows[R / kGroup];
  for (int g = 0; g < R / kGroup; ++g) rows[g] = row_of(queries, width, first + g * kGroup);
  int64_t b = 0;
  for (; b + kKeyBlocks <= blocks; b += kKeyBlocks)
    key_tile<kKeyBlocks>(m + b * R * V, rows, width, grads + b * width * V);
  for (; b < blocks; ++b) key_tile<1>(m + b * R * V, rows, width, grads + b * width * V);
}

// sums[k] = the sum of the lanes of x[k].
INLINE void sum_lanes_of_four(F x[4], float* sums) {
  transpose_quads(x);
  store_sum_of_quads(sums, add(add(x[0], x[1]), add(x[2], x[3])));
}

// Where a strip's row gradients stand while its panels of keys go by: lanes are kept apart until the last panel.
struct RowSums {
  float* sums;  // [row][d][lane]
  bool first, last;
};

template <int N>
INLINE void dot_tile(const float* m, const float* keys, int64_t width, int64_t blocks, RowSums to, float* sums,
                     float* grad) {
  F acc[4][N];
  for (int r = 0; r < 4; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = to.first ? all(0.0f) : load(sums + (r * width + n) * V);
  for (int64_t b = 0; b < blocks; ++b) {
    F key[N];
    for (int n = 0; n < N; ++n) key[n] = load(keys + (b * width + n) * V);
    for (int r = 0; r < 4; ++r) {
      F factor = load(m + (b * R + r) * V);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(factor, key[n], acc[r][n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    if (to.last) {
      F x[4] = {acc[0][n], acc[1][n], acc[2][n], acc[3][n]};
      float part[4];
      sum_lanes_of_four(x, part);
      for (int k = 0; k < 4; ++k) grad[n * V + k] += part[k];
    } else {
      for (int r = 0; r < 4; ++r) store(sums + (r * width + n) * V, acc[r][n]);
    }
  }
}

// grads[row][d] += Σ_j m[row][j] · key[j][d]
void query_gradient(const float* m, int64_t first, const float* keys, int64_t width, int64_t blocks, RowSums to,
                    float* grads) {
  for (int r = 0; r < R; r += 4) {
    float* sums = to.sums + r * width * V;
    float* grad = grads + (first + r) / V * width * V + (first + r) % V;
    int64_t d = 0;
    for (; d + kDotFeatures <= width; d += kDotFeatures)
      dot_tile<kDotFeatures>(m + r * V, keys + d * V, width, blocks, to, sums + d * V, grad + d * V);
    for (; d < width; ++d) dot_tile<1>(m + r * V, keys + d * V, width, blocks, to, sums + d * V, grad + d * V);
  }
}

INLINE void set_zero(float* x, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) store(x + i * V, all(0.0f));
}

// ---- Gathering and scattering -----------------------------------------------------------------------------------

INLINE float to_float(float x) { return x; }
struct Half16 { uint16_t bits; };
struct Brain16 { uint16_t bits; };
INLINE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE float to_float(Brain16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
INLINE float to_float(Half16 x) {
  uint32_t magnitude = x.bits & 0x7fffu;
  float value = magnitude < 0x7c00u ? from_bits(magnitude << 13) * 0x1p112f  // also of subnormal numbers
                                    : from_bits(0x7f800000u | magnitude << 13);
  return x.bits & 0x8000u ? -value : value;
}

// Tokens are turned into lanes four features at a time. What does not lie in memory as a quad of floats is converted.
template <class T>
void gather_typed(const Task& task, const Matrix& matrix, float factor, int64_t block, float* __restrict out) {
  const T* base = static_cast<const T*>(matrix.data) + task.sequence * matrix.batch + task.head * matrix.head;
  int64_t width = matrix.width;
  const T* rows[V];
  for (int lane = 0; lane < V; ++lane) {
    int64_t i = block * V + lane;
    if (i + V < task.length)  // tokens lie a page apart, out of the hardware prefetcher's sight
      for (int64_t d = 0; d < width * static_cast<int64_t>(sizeof(T)); d += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(base + task.tokens[i + V] * matrix.position) + d);
    rows[lane] = i < task.length ? base + task.tokens[i] * matrix.position : nullptr;
  }
  for (int64_t d = 0; d < width; d += 4) {
    int64_t features = width - d < 4 ? width - d : 4;
    bool direct = std::is_same<T, float>::value && matrix.feature == 1 && features == 4;
    float converted[V][4];
    const float* quads[V];
    for (int lane = 0; lane < V; ++lane) {
      quads[lane] = converted[lane];
      if (rows[lane] == nullptr)
        for (int k = 0; k < 4; ++k) converted[lane][k] = 0.0f;
      else if (direct)
        quads[lane] = reinterpret_cast<const float*>(rows[lane]) + d;
      else if (matrix.feature == 1 && features == 4)
        for (int k = 0; k < 4; ++k) converted[lane][k] = to_float(rows[lane][d + k]);
      else
        for (int k = 0; k < 4; ++k)
          converted[lane][k] = k < features ? to_float(rows[lane][(d + k) * matrix.feature]) : 0.0f;
    }
    F x[4];
    for (int k = 0; k < 4; ++k) x[k] = load_quads(quads + k);
    transpose_quads(x);
    for (int k = 0; k < features; ++k) store(out + (d + k) * V, mul(x[k], all(factor)));
  }
}

void gather_matrix(const Task& task, const Matrix& matrix, float factor, int64_t block, float* out) {
  out += block * matrix.width * V;
  if (matrix.type == Type::float32) gather_typed<float>(task, matrix, factor, block, out);
  if (matrix.type == Type::float16) gather_typed<Half16>(task, matrix, factor, block, out);
  if (matrix.type == Type::bfloat16) gather_typed<Brain16>(task, matrix, factor, block, out);
}

void gather_side(const Task& task, const Side& side, int64_t block) {
  const Half& half = *side.half;
  float factor = std::sqrt(std::fabs(half.scale) / kLn2);
  gather_matrix(task, half.key, factor, block, side.keys);
  if (side.queries != side.keys)
    gather_matrix(task, half.query, half.scale < 0 ? -factor : factor, block, side.queries);
  if (side.norms) {
    F sum = all(0.0f);
    for (int64_t d = 0; d < side.width; ++d) {
      F x = load(side.keys + (block * side.width + d) * V);
      sum = fma(x, x, sum);
    }
    store(side.norms + block * V, sum);
  }
}

void gather(const Task& task, int64_t block) {
  gather_side(task, task.teacher, block);
  gather_side(task, task.student, block);
}

INLINE void write_tokens(const Task& task, int64_t block, const float* grads, int64_t width, float* out) {
  float nowhere[4], last[V][4];
  float* rows[V];
  for (int lane = 0; lane < V; ++lane) {
    int64_t i = block * V + lane;
    rows[lane] = i < task.length ? out + task.tokens[i] * task.head_stride : nullptr;
  }
  for (int64_t d = 0; d < width; d += 4) {
    F x[4];
    float* quads[V];
    int64_t features = width - d < 4 ? width - d : 4;
    for (int k = 0; k < 4; ++k) x[k] = k < features ? load(grads + (d + k) * V) : all(0.0f);
    transpose_quads(x);
    for (int lane = 0; lane < V; ++lane) quads[lane] = features < 4 ? last[lane] : rows[lane] ? rows[lane] + d : nowhere;
    for (int k = 0; k < 4; ++k) store_quads(quads + k, x[k]);
    if (features < 4)
      for (int lane = 0; lane < V; ++lane)
        for (int64_t k = 0; rows[lane] && k < features; ++k) rows[lane][d + k] = last[lane][k];
  }
}

void scatter(const Task& task, int64_t block) {
  const Side& side = task.student;
  float factor = std::sqrt(std::fabs(side.half->scale) * kLn2) * task.weight;
  float query_factor = side.half->scale < 0 ? -factor : factor;
  int64_t width = side.width, size = task.blocks * V * width;
  bool apart = side.query_grads != side.key_grads;
  bool self = task.key_out == task.query_out;
  float* queries = side.query_grads + block * V * width;
  float* keys = side.key_grads + block * V * width;
  for (int64_t d = 0; d < width; ++d) {
    F key = load(keys + d * V), query = load(queries + d * V);
    for (int64_t c = 1; c < task.chunks; ++c) {
      key = add(key, load(keys + c * size + d * V));
      query = add(query, load(queries + c * size + d * V));
    }
    key = mul(key, all(factor));
    query = mul(query, all(query_factor));
    store(keys + d * V, self && apart ? add(key, query) : key);
    if (!self) store(queries + d * V, query);
  }
  write_tokens(task, block, keys, width, task.key_out);
  if (!self) write_tokens(task, block, queries, width, task.query_out);
}

// ---- Self relations: unordered pairs ----------------------------------------------------------------------------
//
// u_ij = s_ij − reference, E_ij = 2^u_ij = E_ji, p_ij = E_ij / Σ_k E_ik. A strip of rows i visits the keys j <= i and
// serves (i, j) and, where row j sees key i (i below the prefix), (j, i). A strip is `plain` in a block when all its
// pairs are of both kinds; at the diagonal and at the end of the prefix they are told apart.

Range range(const float* x, int64_t count) {
  F high = all(x[0]), low = sub(all(0.0f), high), finite = all(0.0f);
  for (int64_t i = 0; i < count; i += V) {
    F y = choose(first_lanes(count - i), load(x + i), all(x[0]));
    high = larger(y, high);
    low = larger(sub(all(0.0f), y), low);
    finite = fma(y, all(0.0f), finite);
  }
  float nothing = sum_lanes(finite);
  return {nothing - max_lanes(low), nothing + max_lanes(high)};
}

struct Pairs {
  Keep seen[R], mirrored[R];
};

INLINE bool is_plain(const Task& task, int64_t first, int64_t block) {
  return (block + 1) * V <= first && first + R <= task.prefix;
}

INLINE Pairs pairs_of(const Task& task, int64_t first, int64_t block) {
  Pairs pairs;
  for (int r = 0; r < R; ++r) {
    int64_t before = first + r - block * V;
    pairs.seen[r] = first_lanes(before + 1);
    pairs.mirrored[r] = first_lanes(first + r < task.prefix ? before : 0);
  }
  return pairs;
}

INLINE int64_t strip_blocks(int64_t first) { return (first + R - 1) / V + 1; }

// One block: exponentials, and sums of rows (in `row`, kSumRows × 3) and of columns.
template <bool kPlain>
INLINE void sums_of_block(float* u_t, float* u_s, float* exponentials, const Pairs* pairs, int r0, F row[][3],
                          float* columns, int64_t column_stride) {
  F e_t[kSumRows], e_s[kSumRows], y[kSumRows];
  for (int r = 0; r < kSumRows; ++r) {
    F a_t = load(u_t + (r0 + r) * V), a_s = load(u_s + (r0 + r) * V);
    e_t[r] = fast_exp2_of(a_t);
    e_s[r] = fast_exp2_of(a_s);
    if (!kPlain) {
      e_t[r] = keep(pairs->seen[r0 + r], e_t[r]);
      e_s[r] = keep(pairs->seen[r0 + r], e_s[r]);
    }
    y[r] = mul(e_t[r], sub(a_s, a_t));
    if (exponentials) {
      store(exponentials + (r0 + r) * V, e_t[r]);
      store(exponentials + (R + r0 + r) * V, e_s[r]);
    }
    row[r][0] = add(row[r][0], e_t[r]);
    row[r][1] = add(row[r][1], e_s[r]);
    row[r][2] = add(row[r][2], y[r]);
    if (!kPlain) {
      e_t[r] = keep(pairs->mirrored[r0 + r], e_t[r]);
      e_s[r] = keep(pairs->mirrored[r0 + r], e_s[r]);
      y[r] = keep(pairs->mirrored[r0 + r], y[r]);
    }
  }
  static_assert(kSumRows == 4, "the sums below");
  F c_t = add(add(e_t[0], e_t[1]), add(e_t[2], e_t[3]));
  F c_s = add(add(e_s[0], e_s[1]), add(e_s[2], e_s[3]));
  F c_y = add(add(y[0], y[1]), add(y[2], y[3]));
  store(columns, add(load(columns), c_t));
  store(columns + column_stride, add(load(columns + column_stride), c_s));
  store(columns + 2 * column_stride, add(load(columns + 2 * column_stride), c_y));
}

INLINE void panel_scores(const Task& task, int64_t first, int64_t block, int64_t blocks, float* u_t, float* u_s) {
  const Side &t = task.teacher, &s = task.student;
  scores(t.keys, first, t.keys + block * t.width * V, t.width, blocks, -t.reference, u_t);
  scores(s.keys, first, s.keys + block * s.width * V, s.width, blocks, -s.reference, u_s);
}

INLINE int64_t last_strip(const Task& task, int64_t chunk) {
  int64_t step = task.chunks * R;
  return chunk * R + (task.length - 1 - chunk * R) / step * step;
}

// The first phase keeps the exponentials of as many of its last strips as there is room for. The second goes through
// the strips backwards: it finds in the cache what was kept last.
struct Kept {
  int64_t from;  // first row of the earliest strip that is kept
  float *begin, *end;
};

INLINE int64_t kept_size(int64_t first) { return strip_blocks(first) * 2 * R * V; }

INLINE Kept kept_strips(const Task& task, int64_t chunk) {
  int64_t first = last_strip(task, chunk), size = 0;
  for (; first >= 0 && size + kept_size(first) <= task.kept_size; first -= task.chunks * R) size += kept_size(first);
  return {first + task.chunks * R, task.kept, task.kept + size};
}

void symmetric_sums(const Task& task, int64_t chunk, float* scratch) {
  int64_t padded = task.blocks * V;
  float* recent = task.column_sums + chunk * 6 * padded;
  float* total = recent + 3 * padded;
  set_zero(recent, 6 * task.blocks);
  float *u_t = scratch, *u_s = scratch + kPanelBlocks * R * V;
  int64_t visited = 0;
  Kept kept = kept_strips(task, chunk);
  for (int64_t first = chunk * R; first < task.length; first += task.chunks * R) {
    F row[R][3];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < 3; ++k) row[r][k] = all(0.0f);
    int64_t end = strip_blocks(first);
    float* exponentials = first >= kept.from ? kept.begin : nullptr;
    if (exponentials) kept.begin += kept_size(first);
    for (int64_t block = 0; block < end; block += kPanelBlocks) {
      int64_t blocks = end - block < kPanelBlocks ? end - block : kPanelBlocks;
      panel_scores(task, first, block, blocks, u_t, u_s);
      for (int r = 0; r < R; r += kSumRows) {
        F part[kSumRows][3];
        for (int k = 0; k < kSumRows * 3; ++k) part[k / 3][k % 3] = row[r + k / 3][k % 3];
        for (int64_t b = 0; b < blocks; ++b) {
          float* column = recent + (block + b) * V;
          float* e = exponentials ? exponentials + b * 2 * R * V : nullptr;
          if (is_plain(task, first, block + b)) {
            sums_of_block<true>(u_t + b * R * V, u_s + b * R * V, e, nullptr, r, part, column, padded);
          } else {
            Pairs pairs = pairs_of(task, first, block + b);
            sums_of_block<false>(u_t + b * R * V, u_s + b * R * V, e, &pairs, r, part, column, padded);
          }
        }
        for (int k = 0; k < kSumRows * 3; ++k) row[r + k / 3][k % 3] = part[k / 3][k % 3];
      }
      if (exponentials) exponentials += blocks * 2 * R * V;
    }
    for (int r = 0; r < R; r += 4)
      for (int k = 0; k < 3; ++k) {
        F x[4] = {row[r][k], row[r + 1][k], row[r + 2][k], row[r + 3][k]};
        sum_lanes_of_four(x, task.row_sums + k * padded + first + r);
      }
    if (++visited % kFlushStrips == 0 || first + task.chunks * R >= task.length) {
      for (int64_t i = 0; i < 3 * task.blocks; ++i) store(total + i * V, add(load(total + i * V), load(recent + i * V)));
      set_zero(recent, 3 * task.blocks);
    }
  }
}

// Σ log2 x of positive normal floats: exponents are added, significands, each below 2, multiplied.
struct Log2Sum {
  double significand = 1.0;
  int64_t exponent = 0, count = 0;

  void add(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    exponent += static_cast<int64_t>(bits >> 23) - 127;
    significand *= from_bits((bits & 0x7fffffu) | 0x3f800000u);
    if (++count % 512 == 0) fold();
  }
  void fold() {
    int power;
    significand = std::frexp(significand, &power);
    exponent += power;
  }
  double value() const { return static_cast<double>(exponent) + std::log2(significand); }
};

// 1 / Σ E, and the part of the KL that needs no further pair: −ln 2 Σ_i [ Σ_j p_ij (u_s − u_t)_ij − log2 (l_s / l_t) ].
void symmetric_rows(const Task& task) {
  int64_t padded = task.blocks * V;
  for (int k = 0; k < 3; ++k)
    for (int64_t b = 0; b < task.blocks; ++b) {
      float* sum = task.row_sums + k * padded + b * V;
      F x = load(sum);
      for (int64_t c = 0; c < task.chunks; ++c) x = add(x, load(task.column_sums + (c * 6 + 3 + k) * padded + b * V));
      store(sum, x);
      if (k < 2) store(task.inverse + k * padded + b * V, div(all(1.0f), x));
    }
  for (int64_t i = task.length; i < padded; ++i) task.inverse[i] = task.inverse[padded + i] = 0.0f;
  const float *l_t = task.row_sums, *l_s = l_t + padded, *y = l_s + padded, *inverse_t = task.inverse;
  double sum = 0.0;
  Log2Sum logs_t, logs_s;
  for (int64_t i = 0; i < task.length; ++i) {
    sum += static_cast<double>(y[i]) * inverse_t[i];
    logs_t.add(l_t[i]);
    logs_s.add(l_s[i]);
  }
  sum -= logs_s.value() - logs_t.value();
  task.kl[task.chunks] = -0.693147180559945309 * sum;
}

// m = E_s (1/l_s,i + 1/l_s,j) − E_t (1/l_t,i + 1/l_t,j) = q_ij + q_ji − p_ij − p_ji; returns the lanes' sums. What comes
// in are the exponentials that the first phase kept, or the scores again.
template <bool kPlain, bool kKept>
INLINE F excess_of_block(const float* in_t, const float* in_s, const Pairs* pairs, const float* rows_t,
                         const float* rows_s, F column_t, F column_s, float* m) {
  F total = all(0.0f);
  for (int r = 0; r < R; ++r) {
    F f_t = column_t, f_s = column_s;
    F e_t = load(in_t + r * V), e_s = load(in_s + r * V);
    if (!kKept) {
      e_t = fast_exp2_of(e_t);
      e_s = fast_exp2_of(e_s);
    }
    if (!kPlain) {
      if (!kKept) {
        e_t = keep(pairs->seen[r], e_t);
        e_s = keep(pairs->seen[r], e_s);
      }
      f_t = keep(pairs->mirrored[r], f_t);
      f_s = keep(pairs->mirrored[r], f_s);
    }
    f_t = add(f_t, all(rows_t[r]));
    f_s = add(f_s, all(rows_s[r]));
    F x = sub(mul(e_s, f_s), mul(e_t, f_t));
    store(m + r * V, x);
    total = add(total, x);
  }
  return total;
}

template <bool kKept>
INLINE F excess_of_panel(const Task& task, int64_t first, int64_t block, int64_t blocks, const float* in_t,
                         const float* in_s, int64_t step, const float* rows_t, const float* rows_s, float* m) {
  const float *inverse_t = task.inverse, *inverse_s = task.inverse + task.blocks * V;
  F total = all(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F column_t = load(inverse_t + (block + b) * V), column_s = load(inverse_s + (block + b) * V);
    const float *t = in_t + b * step, *s = in_s + b * step;
    float* out = m + b * R * V;
    if (is_plain(task, first, block + b)) {
      total = add(total, excess_of_block<true, kKept>(t, s, nullptr, rows_t, rows_s, column_t, column_s, out));
    } else {
      Pairs pairs = pairs_of(task, first, block + b);
      total = add(total, excess_of_block<false, kKept>(t, s, &pairs, rows_t, rows_s, column_t, column_s, out));
    }
  }
  return total;
}

void symmetric_gradient(const Task& task, int64_t chunk, float* scratch) {
  int64_t padded = task.blocks * V, width = task.student.width;
  const float *inverse_t = task.inverse, *inverse_s = task.inverse + padded, *keys = task.student.keys;
  float* grads = task.student.key_grads + chunk * padded * width;
  set_zero(grads, task.blocks * width);
  float *m = scratch, *u_s = m + kPanelBlocks * R * V, *sums = u_s + kPanelBlocks * R * V;
  double excess = 0.0;
  Kept kept = kept_strips(task, chunk);
  for (int64_t first = last_strip(task, chunk); first >= 0; first -= task.chunks * R) {
    float rows_t[R], rows_s[R];
    for (int r = 0; r < R; ++r) {
      bool real = first + r < task.length;
      rows_t[r] = real ? inverse_t[first + r] : 0.0f;
      rows_s[r] = real ? inverse_s[first + r] : 0.0f;
    }
    F total = all(0.0f);
    int64_t end = strip_blocks(first);
    const float* exponentials = nullptr;
    if (first >= kept.from) exponentials = kept.end -= kept_size(first);
    for (int64_t block = 0; block < end; block += kPanelBlocks) {
      int64_t blocks = end - block < kPanelBlocks ? end - block : kPanelBlocks;
      F part;
      if (exponentials) {
        part = excess_of_panel<true>(task, first, block, blocks, exponentials, exponentials + R * V, 2 * R * V, rows_t,
                                     rows_s, m);
        exponentials += blocks * 2 * R * V;
      } else {
        panel_scores(task, first, block, blocks, m, u_s);
        part = excess_of_panel<false>(task, first, block, blocks, m, u_s, R * V, rows_t, rows_s, m);
      }
      total = add(total, part);
      key_gradient(m, keys, first, width, blocks, grads + block * width * V);
      query_gradient(m, first, keys + block * width * V, width, blocks, {sums, block == 0, block + blocks == end}, grads);
    }
    excess += sum_lanes(total);
  }
  task.kl[chunk] = excess;
}

// ---- Any relation: a strip of rows with all the keys that it sees -----------------------------------------------

struct Softmax {
  float max, inverse;
  double log2_sum;  // relative to max
};

// Scores of one row become log2 of its exponentials, in place; `exponentials` gets them.
INLINE Softmax softmax_of_row(float* u, float* exponentials, int64_t blocks) {
  F top = all(kHidden);
  for (int64_t b = 0; b < blocks; ++b) top = larger(load(u + b * R * V), top);
  Softmax out;
  out.max = max_lanes(top);
  F sum = all(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F x = sub(load(u + b * R * V), all(out.max)), e = exp2_of(x);
    store(u + b * R * V, x);
    store(exponentials + b * R * V, e);
    sum = add(sum, e);
  }
  float l = sum_lanes(sum);
  out.inverse = 1.0f / l;
  out.log2_sum = std::log2(static_cast<double>(l));
  return out;
}

// KL of one row, Σ p (e^δ − 1 − δ) with δ = log q − log p, which is Σ (q − p) − Σ p δ; where |δ| < 1/4 and `exact`,
// by its series. `m` gets (q − p) · weight.
template <bool kExact>
INLINE float kl_of_row(const float* u_t, const float* u_s, const float* e_t, const float* e_s, Softmax t, Softmax s,
                       float weight, int64_t blocks, float* m) {
  F shift = all(static_cast<float>(t.log2_sum - s.log2_sum));
  F sum = all(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    F delta = mul(add(sub(load(u_s + b * R * V), load(u_t + b * R * V)), shift), all(kLn2));
    F p = mul(load(e_t + b * R * V), all(t.inverse));
    F x = sub(mul(load(e_s + b * R * V), all(s.inverse)), p);
    F kl = fma(sub(all(0.0f), p), delta, x);
    if (kExact) {
      F f = fma(delta, all(1.0f / 720), all(1.0f / 120));
      f = fma(delta, f, all(1.0f / 24));
      f = fma(delta, f, all(1.0f / 6));
      f = fma(delta, f, all(0.5f));
      kl = choose(magnitude_below(delta, 0.25f), mul(mul(p, delta), mul(delta, f)), kl);
    }
    sum = add(sum, kl);
    if (m) store(m + b * R * V, mul(x, all(weight)));
  }
  return sum_lanes(sum);
}

void strips(const Task& task, int64_t chunk, float* scratch) {
  const Side &t = task.teacher, &s = task.student;
  int64_t size = task.blocks * V * s.width, strip = task.blocks * R * V;
  float *u_t = scratch, *u_s = u_t + strip, *e_t = u_s + strip, *e_s = e_t + strip;
  float *key_grads = nullptr, *query_grads = nullptr;
  if (task.gradient) {
    key_grads = s.key_grads + chunk * size;
    query_grads = s.query_grads + chunk * size;
    set_zero(key_grads, task.blocks * s.width);
    set_zero(query_grads, task.blocks * s.width);
  }
  double total = 0.0;
  for (int64_t first = chunk * R; first < task.length; first += task.chunks * R) {
    int64_t rows = task.length - first < R ? task.length - first : R;
    int64_t most = first + rows > task.prefix ? first + rows : task.prefix;    // keys that the last row sees
    int64_t least = first + 1 > task.prefix ? first + 1 : task.prefix;         // and the first one
    int64_t blocks = (most - 1) / V + 1;
    scores(t.queries, first, t.keys, t.width, blocks, 0.0f, u_t);
    scores(s.queries, first, s.keys, s.width, blocks, 0.0f, u_s);
    for (int64_t b = least / V; b < blocks; ++b)
      for (int r = 0; r < R; ++r) {
        int64_t sees = first + r + 1 > task.prefix ? first + r + 1 : task.prefix;
        Keep k = first_lanes((sees < most ? sees : most) - b * V);
        int64_t at = (b * R + r) * V;
        store(u_t + at, choose(k, load(u_t + at), all(kHidden)));
        store(u_s + at, choose(k, load(u_s + at), all(kHidden)));
      }
    for (int r = 0; r < R; ++r) {
      int64_t at = r * V;
      if (r >= rows) {  // rows behind the end weigh nothing
        for (int64_t b = 0; b < blocks; ++b) store(e_t + b * R * V + at, all(0.0f));
        continue;
      }
      int64_t token = task.tokens[first + r];
      Softmax row_t = softmax_of_row(u_t + at, e_t + at, blocks), row_s = softmax_of_row(u_s + at, e_s + at, blocks);
      float weight = task.row_grads ? task.row_grads[token] : 1.0f;
      float* m = task.gradient ? e_t + at : nullptr;
      float kl = task.exact
                     ? kl_of_row<true>(u_t + at, u_s + at, e_t + at, e_s + at, row_t, row_s, weight, blocks, m)
                     : kl_of_row<false>(u_t + at, u_s + at, e_t + at, e_s + at, row_t, row_s, weight, blocks, m);
      if (kl < 0.0f) kl = 0.0f;
      if (task.rows) task.rows[token] = kl;
      total += kl;
    }
    if (task.gradient) {
      key_gradient(e_t, s.queries, first, s.width, blocks, key_grads);
      query_gradient(e_t, first, s.keys, s.width, blocks, {nullptr, true, true}, query_grads);
    }
  }
  task.kl[chunk] = total;
}

}  // namespace

namespace minilm::cpu {

const Kernels KERNELS = {
    KERNELS_NAME, V, 2 * kPanelBlocks * R * V, gather, range, symmetric_sums, symmetric_rows, symmetric_gradient, strips,
    scatter,
};

}  // namespace minilm::cpu
