// The kernels, written once over a vector F of V floats. The mathematics is derived in docs/mathematics.md; the cost
// of each step is counted in docs/cpu.md. Everything has internal linkage: no function compiled for one instruction
// set may be picked by the linker for another.

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"

namespace {

using namespace minilm::cpu;

constexpr int R = kStripRows;
constexpr int64_t kPanelBlocks = 16;    // blocks of keys of which scores are there at a time
constexpr int64_t kSweepBlocks = 64 / V;  // blocks of keys that stay in the cache for all rows of a strip
constexpr int kSumRows = 4;             // rows whose sums are kept in registers
constexpr float kHidden = -1e30f;       // score of a key that a row does not see: its exponential is 0
constexpr float kLn2 = 0.693147180559945309f;

static_assert(R % kTileRows == 0 && R % kSumRows == 0 && R % kGradientRows == 0 && V % kTileRows == 0, "");

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

// ---- Scores -----------------------------------------------------------------------------------------------------
//
// Adders that run beside the multipliers are idle while a plain product goes on. Of each three pairs of features two
// are taken as (x_0 + y_1)(x_1 + y_0) = x_0 y_0 + x_1 y_1 + x_0 x_1 + y_0 y_1: one multiply-add and two additions
// instead of two multiply-adds. What is too much depends on one token alone and is part of its offset.

template <class Pair, class Single>
INLINE void visit_features(int64_t width, const Pair& pair, const Single& single) {
  int64_t d = 0;
  for (; d + 6 <= width; d += 6) {
    pair(d);
    pair(d + 2);
    single(d + 4);
    single(d + 5);
  }
  if (d + 4 <= width) {
    pair(d);
    d += 2;
  }
  for (; d < width; ++d) single(d);
}

struct ScoreInput {
  const float* queries;
  int64_t first;      // row of the strip
  const float* keys;  // from the first block on
  int64_t width;
  const float* row_offsets = nullptr;  // of the strip; with those of the keys they are added to the scores
  const float* key_offsets = nullptr;
};

enum class Product { plain, offset, paired };  // without offsets, with them, and with features in pairs

// out[block][row][lane], a register tile of kTileRows × N blocks.
template <Product kProduct, int N>
INLINE void score_tile(const ScoreInput& in, int64_t row, int64_t block, float* out) {
  int64_t width = in.width;
  const float *rows = row_of(in.queries, width, in.first + row), *keys = in.keys + block * width * V;
  F acc[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) {
      acc[r][n] = all(0.0f);
      if (kProduct != Product::plain)
        acc[r][n] = add(all(in.row_offsets[row + r]), load(in.key_offsets + (block + n) * V));
    }
  auto single = [&](int64_t d) __attribute__((always_inline)) {
    F key[N];
    for (int n = 0; n < N; ++n) key[n] = load(keys + (n * width + d) * V);
    for (int r = 0; r < kTileRows; ++r) {
      F x = all(rows[d * V + r]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, key[n], acc[r][n]);
    }
  };
  auto pair = [&](int64_t d) __attribute__((always_inline)) {
    F key[N][2];
    for (int n = 0; n < 2 * N; ++n) key[n / 2][n % 2] = load(keys + (n / 2 * width + d + n % 2) * V);
    for (int r = 0; r < kTileRows; ++r) {
      F x = all(rows[d * V + r]), y = all(rows[(d + 1) * V + r]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(add(x, key[n][1]), add(y, key[n][0]), acc[r][n]);
    }
  };
  if (kProduct == Product::paired)
    visit_features(width, pair, single);
  else
    for (int64_t d = 0; d < width; ++d) single(d);
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) store(out + ((block + n) * R + row + r) * V, acc[r][n]);
}

template <Product kProduct>
void scores(const ScoreInput& in, int64_t blocks, float* out) {
  int64_t block = 0;
  for (; block + kTileBlocks <= blocks; block += kTileBlocks)
    for (int row = 0; row < R; row += kTileRows) score_tile<kProduct, kTileBlocks>(in, row, block, out);
  for (; block < blocks; ++block)
    for (int row = 0; row < R; row += kTileRows) score_tile<kProduct, 1>(in, row, block, out);
}

// ---- Gradients --------------------------------------------------------------------------------------------------
//
// Tokens and gradients lie token by token here, in chunks of features: [chunk][token][feature], of two vectors, one
// vector, or half of one, in which two tokens share a vector, feature by feature. The last chunk is filled up with
// zeros. A factor of a pair is then one broadcast for both gradients, and no sum of lanes is left.

template <int kVectors_, bool kHalf_>
struct Chunk {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kHalf = kHalf_;
  static constexpr int kTokens = kHalf ? 2 : 1;  // in a step
  static constexpr int kFloats = kVectors * V;   // of a step
  static constexpr int kFeatures = kFloats / kTokens;
  static constexpr int kRows = kHalf ? kGradientRows : kGradientRows / kVectors;  // with their sums in registers
};

// Floats of a token in all chunks.
int64_t row_floats(int64_t width) { return (width + V / 2 - 1) / (V / 2) * (V / 2); }

// body(chunk, its first feature) for every chunk.
template <class Body>
INLINE void visit_chunks(int64_t width, const Body& body) {
  int64_t d = 0;
  for (; width - d > V + V / 2; d += 2 * V) body(Chunk<2, false>(), d);
  if (width - d > V / 2) {
    body(Chunk<1, false>(), d);
    d += V;
  }
  if (width - d > 0) body(Chunk<1, true>(), d);
}

// For kRows rows, and keys of `blocks` blocks: query_grads[row] += Σ_j m[row][j] · keys[j] and
// key_grads[j] += Σ_row m[row][j] · queries[row].
template <class C>
INLINE void gradient_tile(const float* m, const float* queries, const float* keys, int64_t blocks, float* query_grads,
                          float* key_grads) {
  constexpr int N = C::kVectors, kRows = C::kRows;
  F query[kRows][N], sum[kRows][N];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n) {
      if (C::kHalf) {
        F both = load(queries + r / 2 * V);
        query[r][n] = r % 2 ? twice_odd(both) : twice_even(both);
      } else {
        query[r][n] = load(queries + (r * N + n) * V);
      }
      sum[r][n] = all(0.0f);
    }
  for (int64_t b = 0; b < blocks; ++b)
    for (int lane = 0; lane < V; lane += C::kTokens) {
      constexpr int kChains = kRows > 4 ? 2 : 1;  // of sums for the key: one would be too long for its latency to hide
      F key[N], grad[kChains][N];
      for (int n = 0; n < N; ++n) key[n] = load(keys + n * V);
      for (int r = 0; r < kRows; ++r) {
        const float* at = m + (b * R + r) * V + lane;
        F factor = C::kHalf ? all_pair(at) : all(*at);
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
  // Not before: a row may be one of the keys.
  auto add_to = [](float* to, F x) { store(to, add(load(to), x)); };
  if (C::kHalf) {
    for (int r = 0; r < kRows; r += 2) {
      F even = sum[r][0], odd = sum[r + 1][0];
      add_to(query_grads + r / 2 * V, add(mix(even, odd), mix(twice_odd(even), twice_even(odd))));
    }
  } else {
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < N; ++n) add_to(query_grads + (r * N + n) * V, sum[r][n]);
  }
}

// Both gradients of the strip that starts at row `first` and of keys from `block` on; m: [block][row][lane].
void gradients(const float* m, const Task& task, int64_t first, int64_t block, int64_t blocks, float* query_grads,
               float* key_grads) {
  const Side& side = task.student;
  int64_t tokens = task.blocks * V;
  visit_chunks(side.width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    int64_t begin = d * tokens, row = begin + first * C::kFeatures, key = begin + block * V * C::kFeatures;
    for (int64_t b = 0; b < blocks; b += kSweepBlocks) {
      int64_t count = blocks - b < kSweepBlocks ? blocks - b : kSweepBlocks;
      int64_t from = key + b * V * C::kFeatures;
      for (int r = 0; r < R; r += C::kRows)
        gradient_tile<C>(m + (b * R + r) * V, side.query_rows + row + r * C::kFeatures, side.key_rows + from, count,
                         query_grads + row + r * C::kFeatures, key_grads + from);
    }
  });
}

// sums[k] = the sum of the lanes of x[k].
INLINE void sum_lanes_of_four(F x[4], float* sums) {
  transpose_quads(x);
  store_sum_of_quads(sums, add(add(x[0], x[1]), add(x[2], x[3])));
}

INLINE void set_zero(float* x, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) store(x + i * V, all(0.0f));
}

// Sums in two steps, so that their rounding does not grow with the square root of all strips: what the last strips
// gave joins the total after kFlushStrips of them.
class Sums {
 public:
  Sums(float* recent, float* total, int64_t vectors) : recent_(recent), total_(total), vectors_(vectors) {
    set_zero(recent, vectors);
    set_zero(total, vectors);
  }
  float* recent() const { return recent_; }
  void end_strip(bool last) {
    if (++strips_ % kFlushStrips != 0 && !last) return;
    for (int64_t i = 0; i < vectors_ * V; i += V) {
      store(total_ + i, add(load(total_ + i), load(recent_ + i)));
      store(recent_ + i, all(0.0f));
    }
  }

 private:
  float *recent_, *total_;
  int64_t vectors_, strips_ = 0;
};

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

// A matrix of a task: what is read, and where its blocks go.
struct Gathered {
  const Matrix* matrix;
  float* to;
};

// Tokens are turned into lanes four features at a time: straight from memory where these lie there as floats side by
// side, otherwise from a converted copy of some features, filled up with zeros. `of(task)` is the matrix. Neighbouring
// heads share all addresses but one.
template <class T, class Of>
void gather_typed(const Task* const* tasks, int64_t heads, int64_t block, const Of& of) {
  constexpr int64_t kFeatures = 64;
  const Task& task = *tasks[0];
  const Matrix& matrix = *of(task).matrix;
  const int64_t* tokens = task.tokens + block * V;
  int64_t width = matrix.width, left = task.length - block * V, real = left < V ? left : V;
  const T* base = static_cast<const T*>(matrix.data) + task.sequence * matrix.batch;
  const T* rows[V];
  for (int lane = 0; lane < V; ++lane) rows[lane] = base + (lane < real ? tokens[lane] * matrix.position : 0);
  for (int64_t lane = V; lane < 2 * V && lane < left; ++lane) {
    // The next block: tokens lie a page apart, out of the hardware prefetcher's sight.
    const T* row = base + tokens[lane] * matrix.position + task.head * matrix.head;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(row + h * matrix.head + d);
  }
  bool direct = std::is_same<T, float>::value && matrix.feature == 1 && width % 4 == 0 && real == V;
  for (int64_t h = 0; h < heads; ++h) {
    float* to = of(*tasks[h]).to + block * width * V;
    int64_t head = tasks[h]->head * matrix.head;
    auto transpose = [&](const float* const* from, int64_t at, float* __restrict out, int64_t features) {
      for (int64_t d = 0; d < features; d += 4) {
        F x[4];
        for (int k = 0; k < 4; ++k) x[k] = load_quads(from + k, at + d);
        transpose_quads(x);
        for (int k = 0; k < 4 && d + k < features; ++k) store(out + (d + k) * V, x[k]);
      }
    };
    if (direct) {
      transpose(reinterpret_cast<const float* const*>(rows), head, to, width);
      continue;
    }
    float converted[V][kFeatures];
    const float* from[V];
    for (int lane = 0; lane < V; ++lane) from[lane] = converted[lane];
    for (int64_t d = 0; d < width; d += kFeatures) {
      int64_t features = width - d < kFeatures ? width - d : kFeatures;
      for (int lane = 0; lane < V; ++lane) {
        const T* row = rows[lane] + head + d * matrix.feature;
        int64_t known = lane < real ? features : 0;
        if (matrix.feature == 1)
          for (int64_t k = 0; k < known; ++k) converted[lane][k] = to_float(row[k]);
        else
          for (int64_t k = 0; k < known; ++k) converted[lane][k] = to_float(row[k * matrix.feature]);
        for (int64_t k = known; k < (features + 3) / 4 * 4; ++k) converted[lane][k] = 0.0f;
      }
      transpose(from, 0, to + d * V, features);
    }
  }
}

template <class Of>
void gather_matrix(const Task* const* tasks, int64_t heads, int64_t block, const Of& of) {
  Type type = of(*tasks[0]).matrix->type;
  if (type == Type::float32) gather_typed<float>(tasks, heads, block, of);
  if (type == Type::float16) gather_typed<Half16>(tasks, heads, block, of);
  if (type == Type::bfloat16) gather_typed<Brain16>(tasks, heads, block, of);
}

// One block's tokens, feature by feature, are written token by token.
void write_rows(const float* x, int64_t width, int64_t block, int64_t tokens, float* rows) {
  visit_chunks(width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    float* out = rows + d * tokens + block * V * C::kFeatures;
    if (C::kHalf) {
      float nothing[V] = {};
      for (int k = 0; k < C::kFeatures; ++k) {
        const float* lanes = d + k < width ? x + (d + k) * V : nothing;
        for (int pair = 0; pair < V / 2; ++pair) __builtin_memcpy(out + pair * V + 2 * k, lanes + 2 * pair, 8);
      }
      return;
    }
    auto feature = [&](int64_t k) { return d + k < width ? load(x + (d + k) * V) : all(0.0f); };
    for (int k = 0; k < C::kFeatures; k += 4) {
      F quads[4];
      float* to[V];
      for (int q = 0; q < 4; ++q) quads[q] = feature(k + q);
      transpose_quads(quads);
      for (int lane = 0; lane < V; ++lane) to[lane] = out + lane * C::kFeatures + k;
      for (int q = 0; q < 4; ++q) store_quads(to + q, quads[q]);
    }
  });
}

void gather(const Task* const* tasks, int64_t heads, int64_t block) {
  for (Side Task::*side : {&Task::teacher, &Task::student}) {
    const Side& one = tasks[0]->*side;
    gather_matrix(tasks, heads, block, [side](const Task& task) {
      return Gathered{&(task.*side).half->key, (task.*side).keys};
    });
    if (one.queries != one.keys)
      gather_matrix(tasks, heads, block, [side](const Task& task) {
        return Gathered{&(task.*side).half->query, (task.*side).queries};
      });
    for (int64_t h = 0; h < heads; ++h) {
      const Side& x = tasks[h]->*side;
      int64_t tokens = tasks[h]->blocks * V, at = block * x.width * V;
      if (x.key_rows) write_rows(x.keys + at, x.width, block, tokens, x.key_rows);
      if (x.query_rows != x.key_rows) write_rows(x.queries + at, x.width, block, tokens, x.query_rows);
    }
  }
}

// A block of a gradient goes to its tokens.
void scatter_matrix(const Task& task, int64_t block, const float* grads, float* out) {
  int64_t width = task.student.width, tokens = task.blocks * V, size = tokens * row_floats(width);
  F factor = all(task.student.half->scale * task.weight);
  visit_chunks(width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    const float* from = grads + d * tokens + block * V * C::kFeatures;
    int64_t features = width - d < C::kFeatures ? width - d : C::kFeatures;
    for (int lane = 0; lane < V; lane += C::kTokens) {
      float part[C::kTokens][C::kFeatures], *to[C::kTokens];
      for (int k = 0; k < C::kTokens; ++k) {
        int64_t i = block * V + lane + k;
        bool whole = i < task.length && features == C::kFeatures;
        to[k] = whole ? out + task.tokens[i] * task.head_stride + d : part[k];
      }
      for (int n = 0; n < C::kVectors; ++n) {
        const float* at = from + lane * C::kFeatures + n * V;
        F x = load(at);
        for (int64_t c = 1; c < task.chunks; ++c) x = add(x, load(at + c * size));
        x = mul(x, factor);
        if (C::kHalf)
          store_halves(to[0], to[C::kTokens - 1], x);
        else
          store(to[0] + n * V, x);
      }
      for (int k = 0; k < C::kTokens; ++k)
        if (int64_t i = block * V + lane + k; features < C::kFeatures && i < task.length)
          for (int f = 0; f < features; ++f) out[task.tokens[i] * task.head_stride + d + f] = part[k][f];
    }
  });
}

void scatter(const Task& task, int64_t block) {
  scatter_matrix(task, block, task.student.key_grads, task.key_out);
  if (task.query_out != task.key_out) scatter_matrix(task, block, task.student.query_grads, task.query_out);
}

// Scores come out in units of log 2.
INLINE float fold_factor(const Side& side) { return std::sqrt(std::fabs(side.half->scale) / kLn2); }

void fold(const Task& task, const Side& side) {
  auto multiply = [&](float* x, float factor) {
    for (int64_t i = 0; i < task.blocks * side.width; ++i) store(x + i * V, mul(load(x + i * V), all(factor)));
  };
  float factor = fold_factor(side);
  multiply(side.keys, factor);
  if (side.queries != side.keys) multiply(side.queries, side.half->scale < 0 ? -factor : factor);
}

// ---- Self relations: unordered pairs ----------------------------------------------------------------------------
//
// u_ij = s_ij − reference, E_ij = 2^u_ij = E_ji, p_ij = E_ij / Σ_k E_ik. A strip of rows i visits the keys j < i and
// serves (i, j) and, where row j sees key i (i below the prefix), (j, i). A strip is `plain` in a block when all its
// pairs are of both kinds; at the diagonal and at the end of the prefix they are told apart. The diagonal itself is
// apart: where it is nearly all of its row, q_ii − p_ii is the difference of what p and q leave to the others.

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

// With μ the mean of all tokens, x̃ = x − μ, b_i = μ·x̃_i and the reference |μ|²: u_ij = x̃_i·x̃_j + b_i + b_j. So
// scores round as their spread asks, however large what they have in common; for that the scale comes after the mean.
// The offsets become b, the norms u_ii.
void center(const Task& task, const Side& side) {
  int64_t width = side.width;
  constexpr int kTogether = 8;  // features that lie side by side
  for (int64_t first = 0; first < width; first += kTogether) {
    int count = static_cast<int>(width - first < kTogether ? width - first : kTogether);
    F sums[kTogether];
    for (int k = 0; k < kTogether; ++k) sums[k] = all(0.0f);
    for (int64_t b = 0; b < task.blocks; ++b) {
      const float* keys = side.keys + (b * width + first) * V;
      if (count == kTogether)
        for (int k = 0; k < kTogether; ++k) sums[k] = add(sums[k], load(keys + k * V));
      else
        for (int k = 0; k < count; ++k) sums[k] = add(sums[k], load(keys + k * V));
    }
    for (int k = 0; k < count; ++k) side.mean[first + k] = sum_lanes(sums[k]) / static_cast<float>(task.length);
  }
  float factor = fold_factor(side);
  for (int64_t b = 0; b < task.blocks; ++b) {
    float* keys = side.keys + b * width * V;
    F offset = all(0.0f), square = all(0.0f), products = all(0.0f);
    auto single = [&](int64_t d) __attribute__((always_inline)) {
      F x = mul(sub(load(keys + d * V), all(side.mean[d])), all(factor));
      store(keys + d * V, x);
      offset = fma(x, all(side.mean[d] * factor), offset);
      square = fma(x, x, square);
      return x;
    };
    auto pair = [&](int64_t d) __attribute__((always_inline)) {
      F x = single(d), y = single(d + 1);
      products = fma(x, y, products);
    };
    if (task.paired)
      visit_features(width, pair, single);
    else
      for (int64_t d = 0; d < width; ++d) single(d);
    store(side.norms + b * V, add(square, add(offset, offset)));
    store(side.offsets + b * V, sub(offset, products));
  }
}

// Another reference.
void shift(const Task& task, const Side& side, float reference) {
  for (int64_t i = 0; i < task.blocks * V; i += V) {
    store(side.offsets + i, sub(load(side.offsets + i), all(reference / 2)));
    store(side.norms + i, sub(load(side.norms + i), all(reference)));
  }
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
    pairs.seen[r] = first_lanes(before);
    pairs.mirrored[r] = first_lanes(first + r < task.prefix ? before : 0);
  }
  return pairs;
}

INLINE int64_t strip_blocks(int64_t first) { return (first + R - 2) / V + 1; }

// One block: exponentials, kept where wanted, and sums of kSumRows rows and of the block's columns.
template <bool kPlain, bool kKeep>
INLINE void sums_of_block(const float* u_t, const float* u_s, float* exponentials, const Pairs* pairs, int r0,
                          F row[][3], float* columns, int64_t column_stride) {
  F e_t[kSumRows], e_s[kSumRows], column_y = load(columns + 2 * column_stride);
  for (int r = 0; r < kSumRows; ++r) {
    F a_t = load(u_t + (r0 + r) * V), a_s = load(u_s + (r0 + r) * V);
    F difference = sub(a_s, a_t);
    e_t[r] = fast_exp2_of(a_t);
    e_s[r] = fast_exp2_of(a_s);
    if (!kPlain) {
      e_t[r] = keep(pairs->seen[r0 + r], e_t[r]);
      e_s[r] = keep(pairs->seen[r0 + r], e_s[r]);
    }
    if (kKeep) {
      store(exponentials + (r0 + r) * V, e_t[r]);
      store(exponentials + (R + r0 + r) * V, e_s[r]);
    }
    row[r][0] = add(row[r][0], e_t[r]);
    row[r][1] = add(row[r][1], e_s[r]);
    row[r][2] = fma(e_t[r], difference, row[r][2]);
    if (!kPlain) {
      e_t[r] = keep(pairs->mirrored[r0 + r], e_t[r]);
      e_s[r] = keep(pairs->mirrored[r0 + r], e_s[r]);
    }
    column_y = fma(e_t[r], difference, column_y);
  }
  static_assert(kSumRows == 4, "the sums below");
  F c_t = add(add(e_t[0], e_t[1]), add(e_t[2], e_t[3]));
  F c_s = add(add(e_s[0], e_s[1]), add(e_s[2], e_s[3]));
  store(columns, add(load(columns), c_t));
  store(columns + column_stride, add(load(columns + column_stride), c_s));
  store(columns + 2 * column_stride, column_y);
}

// The same for a strip and a panel of keys.
template <bool kKeep>
INLINE void sums_of_panel(const Task& task, int64_t first, int64_t block, int64_t blocks, const float* u_t,
                          const float* u_s, float* exponentials, F row[][3], float* columns) {
  int64_t padded = task.blocks * V;
  for (int r = 0; r < R; r += kSumRows) {
    F part[kSumRows][3];
    for (int k = 0; k < kSumRows * 3; ++k) part[k / 3][k % 3] = row[r + k / 3][k % 3];
    for (int64_t b = 0; b < blocks; ++b) {
      const float *t = u_t + b * R * V, *s = u_s + b * R * V;
      float *column = columns + (block + b) * V, *e = exponentials + b * 2 * R * V;
      if (is_plain(task, first, block + b)) {
        sums_of_block<true, kKeep>(t, s, e, nullptr, r, part, column, padded);
      } else {
        Pairs pairs = pairs_of(task, first, block + b);
        sums_of_block<false, kKeep>(t, s, e, &pairs, r, part, column, padded);
      }
    }
    for (int k = 0; k < kSumRows * 3; ++k) row[r + k / 3][k % 3] = part[k / 3][k % 3];
  }
}

INLINE void panel_scores(const Task& task, int64_t first, int64_t block, int64_t blocks, float* u_t, float* u_s) {
  auto of_side = [&](const Side& x, float* u) {
    ScoreInput in{x.keys, first, x.keys + block * x.width * V, x.width, x.offsets + first, x.offsets + block * V};
    task.paired ? scores<Product::paired>(in, blocks, u) : scores<Product::offset>(in, blocks, u);
  };
  of_side(task.teacher, u_t);
  of_side(task.student, u_s);
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
  float* column_sums = task.column_sums + chunk * 6 * padded;
  Sums columns(column_sums, column_sums + 3 * padded, 3 * task.blocks);
  float *u_t = scratch, *u_s = scratch + kPanelBlocks * R * V;
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
    columns.end_strip(first + task.chunks * R >= task.length);
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

// 1 / Σ E, what the diagonal adds to the gradient, and the part of the KL that needs no further pair:
// Σ_i (q_ii − p_ii) − ln 2 Σ_i [ Σ_j p_ij (u_s − u_t)_ij − log2 (l_s / l_t) ].
void symmetric_rows(const Task& task) {
  int64_t padded = task.blocks * V;
  float *l_t = task.row_sums, *l_s = l_t + padded, *y = l_s + padded;
  float *inverse_t = task.inverse, *inverse_s = inverse_t + padded, *diagonal = task.student.norms;
  double excess = 0.0;
  for (int64_t i = 0; i < padded; i += V) {
    F sums[3];
    for (int k = 0; k < 3; ++k) {
      sums[k] = load(task.row_sums + k * padded + i);
      for (int64_t c = 0; c < task.chunks; ++c)
        sums[k] = add(sums[k], load(task.column_sums + (c * 6 + 3 + k) * padded + i));
    }
    Keep real = first_lanes(task.length - i);
    F u_t = load(task.teacher.norms + i), u_s = load(task.student.norms + i);
    F e_t = keep(real, exp2_of(u_t)), e_s = keep(real, exp2_of(u_s));
    F all_t = add(sums[0], e_t), all_s = add(sums[1], e_s);
    F i_t = keep(real, div(all(1.0f), all_t)), i_s = keep(real, div(all(1.0f), all_s));
    store(l_t + i, all_t);
    store(l_s + i, all_s);
    store(y + i, fma(e_t, sub(u_s, u_t), sums[2]));
    store(inverse_t + i, i_t);
    store(inverse_s + i, i_s);
    F p = mul(e_t, i_t), q = mul(e_s, i_s), difference = sub(q, p);
    excess += sum_lanes(difference);
    F others = sub(mul(keep(real, sums[0]), i_t), mul(keep(real, sums[1]), i_s));
    difference = choose(magnitude_below(q, 0.5f), difference, others);
    store(diagonal + i, add(difference, difference));
  }
  double sum = 0.0;
  Log2Sum logs_t, logs_s;
  for (int64_t i = 0; i < task.length; ++i) {
    sum += static_cast<double>(y[i]) * inverse_t[i];
    logs_t.add(l_t[i]);
    logs_s.add(l_s[i]);
  }
  sum -= logs_s.value() - logs_t.value();
  task.kl[task.chunks] = excess - 0.693147180559945309 * sum;
}

// grads[i] += 2 (q_ii − p_ii) x_i
void diagonal_gradient(const Task& task, float* grads) {
  int64_t tokens = task.blocks * V;
  visit_chunks(task.student.width, [&](auto chunk, int64_t d) __attribute__((always_inline)) {
    using C = decltype(chunk);
    for (int64_t i = 0; i < tokens; i += C::kTokens) {
      const float* at = task.student.norms + i;
      F factor = C::kHalf ? all_pair(at) : all(*at);
      for (int n = 0; n < C::kVectors; ++n) {
        int64_t to = d * tokens + i * C::kFeatures + n * V;
        store(grads + to, fma(factor, load(task.student.key_rows + to), load(grads + to)));
      }
    }
  });
}

// m = E_s (1/l_s,i + 1/l_s,j) − E_t (1/l_t,i + 1/l_t,j) = q_ij + q_ji − p_ij − p_ji; returns the lanes' sums. What
// comes in are the exponentials that the first phase kept, or the scores again. The teacher's factors come negative.
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
    F x = fma(e_t, f_t, mul(e_s, f_s));
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
    F column_t = sub(all(0.0f), load(inverse_t + (block + b) * V)), column_s = load(inverse_s + (block + b) * V);
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
  int64_t padded = task.blocks * V, size = padded * row_floats(task.student.width);
  const float *inverse_t = task.inverse, *inverse_s = task.inverse + padded;
  float* total = task.student.key_grads + chunk * size;
  Sums grads(task.student.recent_grads + chunk * size, total, size / V);
  if (chunk == 0) diagonal_gradient(task, total);
  float *m = scratch, *u_s = m + kPanelBlocks * R * V;
  double excess = 0.0;
  Kept kept = kept_strips(task, chunk);
  for (int64_t first = last_strip(task, chunk); first >= 0; first -= task.chunks * R) {
    float rows_t[R], rows_s[R];
    for (int r = 0; r < R; ++r) {
      bool real = first + r < task.length;
      rows_t[r] = real ? -inverse_t[first + r] : 0.0f;
      rows_s[r] = real ? inverse_s[first + r] : 0.0f;
    }
    F sum = all(0.0f);
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
      sum = add(sum, part);
      gradients(m, task, first, block, blocks, grads.recent(), grads.recent());
    }
    excess += sum_lanes(sum);
    grads.end_strip(first == chunk * R);
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
  int64_t size = task.blocks * V * row_floats(s.width), strip = task.blocks * R * V;
  float *u_t = scratch, *u_s = u_t + strip, *e_t = u_s + strip, *e_s = e_t + strip;
  bool apart = s.query_grads != s.key_grads;
  int64_t vectors = task.gradient ? size / V : 0;
  Sums grads(s.recent_grads + chunk * size, s.key_grads + chunk * size, vectors);
  float* query_grads = apart ? s.query_grads + chunk * size : grads.recent();
  if (apart) set_zero(query_grads, vectors);
  double total = 0.0;
  for (int64_t first = chunk * R; first < task.length; first += task.chunks * R) {
    int64_t rows = task.length - first < R ? task.length - first : R;
    int64_t most = first + rows > task.prefix ? first + rows : task.prefix;    // keys that the last row sees
    int64_t least = first + 1 > task.prefix ? first + 1 : task.prefix;         // and the first one
    int64_t blocks = (most - 1) / V + 1;
    scores<Product::plain>({t.queries, first, t.keys, t.width}, blocks, u_t);
    scores<Product::plain>({s.queries, first, s.keys, s.width}, blocks, u_s);
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
    if (task.gradient) gradients(e_t, task, first, 0, blocks, query_grads, grads.recent());
    grads.end_strip(first + task.chunks * R >= task.length);
  }
  task.kl[chunk] = total;
}

}  // namespace

namespace minilm::cpu {

const Kernels KERNELS = {
    V, 2 * kPanelBlocks * R * V, row_floats, gather, range, center, shift, fold, symmetric_sums, symmetric_rows,
    symmetric_gradient, strips, scatter,
};

}  // namespace minilm::cpu
