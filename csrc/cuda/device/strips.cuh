// The schedule of the symmetric path for heads of few chunks. A warp owns a strip of rows for a whole phase:
// their operands, their sums and their gradients stay in registers while the strip meets the columns of other strips,
// 16 at a time. In round d, strip i meets strip i + d (schedule.cuh), so that no two strips of a round share columns.
//
// Two things keep the arithmetic beside the exponentials small:
// - The factors 1/l_i + 1/l_j of phase 2 are products of tensor cores as well: (1/l_i, ones) · (ones, 1/l_j), with 1/l
// as
//   the sum of two bfloat16 numbers. The ones are zeros for tokens that do not exist, and for directions that are not
//   visible. Phase 2 therefore needs no mask, except on the diagonal of a causal relation.
// - On the diagonal, a strip meets its own 16 columns only from the rows of these columns on. The 16 × 16 square of the
//   diagonal itself has all its pairs in both orders, so that its columns' sums are complete without those of its rows.
#pragma once

#include "schedule.cuh"
#include "tile.cuh"

namespace minilm::cuda {

// The kTiles · 16 rows of a strip: first operands of mma.
template <int kFormat, int kTiles, int kChunks>
struct RowOperands {
  uint32_t x[kTiles][2 * kChunks];

  MINILM_DEVICE void load(const Tokens& rows) {
    const int lane = lane_index();
    MINILM_UNROLL_FOR (int chunk = 0; chunk + 1 < kChunks; chunk += 2)
      MINILM_UNROLL_FOR (int m = 0; m < kTiles; ++m) {
        uint32_t r[4];
        ldmatrix_x4(r, rows.planes + 256 * m + lane % 16 * 16 + (chunk + lane / 16) * rows.plane);
        MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) x[m][2 * chunk + q] = r[q];
      }
    if (kChunks % 2)
      MINILM_UNROLL_FOR (int m = 0; m < kTiles; m += 2) {
        uint32_t r[4];
        ldmatrix_x4(r, rows.planes + 256 * m + lane * 16 + (kChunks - 1) * rows.plane);
        MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) x[m + q / 2][2 * kChunks - 2 + q % 2] = r[q];
      }
  }

  // Scores of the 16 rows of tile m and 16 columns. kSquare: these are the same tokens, and m need not be a constant.
  template <bool kSquare>
  MINILM_DEVICE void scores(float (&out)[2][4], int m, const uint32_t (&y)[2][kChunks]) const {
    uint32_t own[2 * kChunks];
    MINILM_UNROLL_FOR (int k = 0; k < 2 * kChunks; ++k) own[k] = kSquare ? y[k % 2][k / 2] : x[m][k];
    MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) {
      float (&c)[4] = out[n];
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) c[e] = 0.0f;
      MINILM_UNROLL_FOR (int chunk = 0; chunk + 1 < kChunks; chunk += 2)
        multiply_add(kFormat, c, own + 2 * chunk, y[n][chunk], y[n][chunk + 1]);
      if (kChunks % 2) multiply_add(kFormat, c, own[2 * kChunks - 2], own[2 * kChunks - 1], y[n][kChunks - 1]);
    }
  }
};

// Float32 rows are loaded anew for each 16 columns: their three splits and the offsets take too many registers.
template <int kTiles, int kChunks>
struct RowOperands<kFloat32, kTiles, kChunks> {
  static constexpr int kPlanes = score_planes(kFloat32, kChunks);
  const char* rows;  // a lane's address
  int plane;

  MINILM_DEVICE void load(const Tokens& first) {
    rows = first.planes + lane_index() % 16 * 16 + lane_index() / 16 * first.plane;
    plane = first.plane;
  }

  // Small products first, as in tile.cuh. Two products of 8 features make one of 16.
  template <bool>
  MINILM_DEVICE void scores(float (&out)[2][4], int m, const uint32_t (&y)[2][kPlanes]) const {
    uint32_t x[kPlanes + 1][2];
    MINILM_UNROLL_FOR (int k = 0; k < kPlanes; k += 2) {
      uint32_t r[4];
      // The last one may be alone: the upper lanes' addresses are then not used.
      if (k + 1 < kPlanes) {
        ldmatrix_x4(r, rows + 256 * m + k * plane);
      } else {
        uint32_t one[2];
        ldmatrix_x2(one, rows + 256 * m + k * plane);
        r[0] = one[0], r[1] = one[1], r[2] = r[3] = 0u;
      }
      MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) x[k + q / 2][q % 2] = r[q];
    }
    MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) {
      float (&c)[4] = out[n];
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) c[e] = 0.0f;
      MINILM_UNROLL_FOR (int step = 0; step + 1 < kSteps; step += 2) {
        const int a = left_of(step), b = left_of(step + 1);
        const uint32_t both[4] = {x[a][0], x[a][1], x[b][0], x[b][1]};
        multiply_add(kFloat32, c, both, y[n][right_of(step)], y[n][right_of(step + 1)]);
      }
      const int last = left_of(kSteps - 1);
      mma_m16n8k8(c, x[last][0], x[last][1], y[n][right_of(kSteps - 1)]);
    }
  }

  // Planes of the operands of product `step`: splits (0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0) of each chunk, then
  // the offsets. A single chunk has another order, in which two products have neighbouring planes of rows, which lie in
  // neighbouring registers.
  static constexpr int kSteps = 6 * kChunks + 1;
  static constexpr MINILM_DEVICE int left_of(int step) {
    if (kChunks == 1) return step < 4 ? step % 2 : step < 6 ? step - 2 : 0;
    const int k = step / kChunks;
    return (k < 3 ? k : k < 5 ? k - 3 : k < 6 ? 0 : 3) * kChunks + step % kChunks;
  }
  static constexpr MINILM_DEVICE int right_of(int step) {
    if (kChunks == 1) return step == 0 ? 2 : step < 3 ? 1 : step == 5 ? 3 : 0;
    const int k = step / kChunks;
    return (k < 3 ? 2 - k : k < 5 ? 4 - k : k < 6 ? 0 : 3) * kChunks + step % kChunks;
  }
};

// 16 columns of one model: a lane's addresses for loading two chunks, and one.
struct ColumnTokens {
  const char *two, *one, *offset;
  int plane;

  MINILM_DEVICE explicit ColumnTokens(const Tokens& first)
      : two(first.planes + (lane_index() / 16 * 8 + lane_index() % 8) * 16 + lane_index() / 8 % 2 * first.plane),
        one(first.planes + lane_index() % 16 * 16),
        offset(first.planes + lane_index() / 4 * 16 + (lane_index() ^ 2) % 4 * 4),
        plane(first.plane) {}
  MINILM_DEVICE void next() {
    two += 256;
    one += 256;
    offset += 256;
  }

  // As the second operand of mma. kPlanes: score_planes(kFormat, chunks).
  template <int kFormat, int kPlanes>
  MINILM_DEVICE void load(uint32_t (&y)[2][kPlanes]) const {
    constexpr int kChunks = kFormat == kFloat32 ? kPlanes - 1 : kPlanes;
    MINILM_UNROLL_FOR (int chunk = 0; chunk + 1 < kChunks; chunk += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, two + chunk * plane);
      MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) y[q / 2][chunk + q % 2] = r[q];
    }
    if (kChunks % 2) {
      uint32_t r[2];
      ldmatrix_x2(r, one + (kChunks - 1) * plane);
      y[0][kChunks - 1] = r[0];
      y[1][kChunks - 1] = r[1];
    }
    if (kFormat == kFloat32)
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) y[n][kPlanes - 1] = load_word(offset + kChunks * plane + 128 * n);
  }
};

// Numbers of a lane, of neighbouring columns, that are computed at once: two on compute capability 10.x, else one.
template <int kCount>
struct NumbersOf {
  using type = float;
};
template <>
struct NumbersOf<2> {
  using type = Float2;
};
MINILM_DEVICE void load(float& x, const float* from) { x = *from; }
MINILM_DEVICE void load(Float2& x, const float* from) { x = {from[0], from[1]}; }
MINILM_DEVICE void store(float* to, float x) { *to = x; }
MINILM_DEVICE void store(float* to, const Float2& x) { to[0] = x.x, to[1] = x.y; }
MINILM_DEVICE void append(float& x, float last) { x = last; }
MINILM_DEVICE void append(Float2& x, float last) { x = {x.y, last}; }
MINILM_DEVICE float total(float x) { return x; }
MINILM_DEVICE float total(const Float2& x) { return x.x + x.y; }
MINILM_DEVICE float total(const float (&x)[2]) { return x[0] + x[1]; }
MINILM_DEVICE float total(const Float2 (&x)[1]) { return total(x[0]); }
MINILM_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
MINILM_DEVICE Float2 fused(const Float2& a, float b, const Float2& c) { return fused(a, {b, b}, c); }
MINILM_DEVICE Float2 fused(const Float2& a, float b, float c) { return fused(a, {b, b}, {c, c}); }
MINILM_DEVICE Float2 operator-(const Float2& a) { return {-a.x, -a.y}; }
MINILM_DEVICE void operator+=(Float2& a, const Float2& b) { a = a + b; }
MINILM_DEVICE Float2 exp2_fast(const Float2& u) { return {exp2_fast(u.x), exp2_fast(u.y)}; }

// 2^u = 2^n p(f) with multiply-adds, for u <= 127. n is u rounded to an integer, by adding a number whose unit is 1, and
// f = u - n, which is exact. p errs by 3e-9 relative to 2^f, its roundings by less than 1.4 · 2^-24; p(0) = 1
// (docs/cuda.md). Results are 0 up to u = -127, and between 0 and 2^-126 up to -126.
MINILM_DEVICE Float2 exp2_polynomial(Float2 u) {
  u = {fmaxf(u.x, -127.0f), fmaxf(u.y, -127.0f)};
  constexpr float kInteger = 12582912.0f;  // 1.5 · 2^23
  const Float2 shifted = u + Float2{kInteger, kInteger};
  const Float2 f = u - (shifted - Float2{kInteger, kInteger});
  Float2 p = fused(f, 1.5330708e-4f, 1.3390975e-3f);
  constexpr float kCoefficients[] = {9.6184965e-3f, 5.5503596e-2f, 0.24022648f, 0.69314718f, 1.0f};
  MINILM_UNROLL_FOR (int k = 0; k < 5; ++k) p = fused(p, f, Float2{kCoefficients[k], kCoefficients[k]});
  auto scaled = [](float x, float integer) { return as_float(as_bits(x) + (as_bits(integer) << 23)); };
  return {scaled(p.x, shifted.x), scaled(p.y, shifted.y)};
}

// A constant as an argument.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Pairs of a strip and 16 columns.
enum class Part {
  whole,         // all pairs, in both orders
  rows_only,     // only the rows see the columns: they are later
  columns_only,  // only the columns see the rows
  square,        // the columns are rows of the strip
  ragged,        // some tokens are beyond the end of the sequence, or of the prefix
};

// A token has 16 bytes, four words. Phase 1: the sums of teacher and student in the last two. Phase 2, pairs of
// bfloat16 numbers: ones if earlier tokens see this one; ones if it exists; 1/l of the teacher, 1/l of the student.
// `scale`: grad_scale of the student's format, a factor of 1/l and thus of M.
MINILM_DEVICE Uint4 factors_of(float sum_t, float sum_s, float scale, bool exists, bool seen, bool counted) {
  auto inverse = [&](float sum) {
    const float x = scale / sum, high = low_of(pack_bfloat16(x, 0.0f));
    return pack_bfloat16(high, sub(x, high));
  };
  Uint4 factors;
  factors.word[0] = exists && seen ? 0x3f803f80u : 0u;
  factors.word[1] = exists ? 0x3f803f80u : 0u;
  factors.word[2] = counted ? inverse(sum_t) : 0u;  // 0: every probability of the row is 0
  factors.word[3] = counted ? inverse(sum_s) : 0u;
  return factors;
}

// A token's logarithms' contribution to the loss. It takes the same rounded 1/l as the pairs do: their rounding errors
// then cancel to first order.
MINILM_DEVICE float log_ratio(const Uint4& factors) {
  auto inverse = [](uint32_t split) { return add(low_of(split), high_of(split)); };
  return factors.word[2] ? kLn2 * log2_of_ratio(inverse(factors.word[2]), inverse(factors.word[3])) : 0.0f;
}

template <class Shared, int kTiles, int kChunksT, int kChunksS, bool kCausal>
struct Strips {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kFormat = Shared::kStudentFormat, kFormatT = Shared::kTeacherFormat;
  static constexpr int kPlanesT = score_planes(kFormatT, kChunksT), kPlanesS = score_planes(kFormat, kChunksS);
  // Splits of score gradients, and the format of their products.
  static constexpr int kSplits = grad_splits_in(kFormat), kProducts = kSplits == 2 ? kFloat16 : kFormat;
  static constexpr float kGradScale = grad_scale(kFormat);  // a factor of 1/l, and thus of M
  static constexpr int kWide = numbers_at_once(kCapability);
  static constexpr bool kPolynomials = has_polynomials(kFormat, kChunksT, kFormatT, kChunksS, kCapability);
  using Numbers = typename NumbersOf<kWide>::type;
  static MINILM_DEVICE Numbers neighbours(const float* first) {
    Numbers numbers;
    load(numbers, first);
    return numbers;
  }

  // By polynomial: the pairs of the first 8 rows and the first 8 columns of 16 × 16. This set is its own transpose and
  // the same in both phases and all parts, so that E_ij = E_ji has the same bits wherever it is computed.
  template <class T>  // Numbers
  static MINILM_DEVICE T exponential(const T& u, int n, int e) {
    if constexpr (kPolynomials)
      if (n == 0 && e < 2) return exp2_polynomial(u);
    return exp2_fast(u);
  }

  struct Rows {
    RowOperands<kFormatT, kTiles, kChunksT> t;
    RowOperands<kFormat, kTiles, kChunksS> s;
    float scale_t, scale_s, reference_t, reference_s;

    MINILM_DEVICE void load(const Shared& shared, int first) {
      const auto& state = shared.state();
      t.load(shared.teacher(first));
      s.load(shared.student(first));
      scale_t = state.scale_t;
      scale_s = state.scale_s;
      reference_t = state.reference_t;
      reference_s = state.reference_s;
    }
    template <bool kSquare>
    MINILM_DEVICE void exponents(float (&u_t)[2][4], float (&u_s)[2][4], int m,
                                 const uint32_t (&columns_t)[2][kPlanesT],
                                 const uint32_t (&columns_s)[2][kPlanesS]) const {
      t.template scores<kSquare>(u_t, m, columns_t);
      s.template scores<kSquare>(u_s, m, columns_s);
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 4; e += kWide) {
          store(&u_t[n][e], fused(neighbours(&u_t[n][e]), scale_t, -reference_t));
          store(&u_s[n][e], fused(neighbours(&u_s[n][e]), scale_s, -reference_s));
        }
    }
  };

  // 16 columns: their tokens, and what a lane reads and writes of their factors, sums and gradients.
  struct Columns {
    ColumnTokens teacher, student;
    const char* factors;
    float *sums, *grads;

    MINILM_DEVICE Columns(const Shared& shared, int first, bool later)
        : teacher(shared.teacher(first)), student(shared.student(first)) {
      const int lane = lane_index();
      factors = shared.factors(first) + column_factor(later);
      // The lane that distributed_sums gives model k = lane / 16, and a column.
      const int column = lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
      sums = sum_of(shared, first + column, lane / 16);
      grads = shared.grads(first) + lane / 4 * 8 + lane % 4 * 2;
    }
    MINILM_DEVICE void next() {
      teacher.next();
      student.next();
      factors += 256;
      sums += 64;
      grads += 128;
    }
  };

  // Gradients of float32 students need more than two splits of 1/l: each model has four words of its own, in the second
  // of two planes for the student. The last two have its sum, and later the three splits of its 1/l.
  static constexpr bool kThree = kFormat == kFloat32;
  static MINILM_DEVICE float* sum_of(const Shared& shared, int token, int model) {
    float* words = reinterpret_cast<float*>(shared.factors(token)) + 2;
    return kThree ? words + model * (shared.plane() / 4) : words + model;
  }
  // Offset of a lane's word of a row as first operand: 1/l_t, 1/l_s, ones, ones. `later`: the rows are later than the
  // columns. These ones are factors of the columns' 1/l, so they tell whether the columns see the row.
  static MINILM_DEVICE int row_factor(bool later) {
    const int t = lane_index() % 4;
    return lane_index() / 4 * 16 + (t < 2 ? 8 + 4 * t : later ? 0 : 4);
  }
  // The same for a column as second operand: ones, ones, 1/l_t, 1/l_s. Each model's product leaves out the other's
  // words.
  static MINILM_DEVICE int column_factor(bool later) {
    const int t = lane_index() % 4;
    return lane_index() / 4 * 16 + (t >= 2 ? 4 * t : later ? 4 : 0);
  }
  // 1/l_i + 1/l_j of 16 rows and 8 columns, each where it is visible.
  static MINILM_DEVICE void factors(float (&t)[4], float (&s)[4], const uint32_t (&row)[2], uint32_t column) {
    static_assert(!kThree, "one plane of words");
    const bool student = lane_index() % 2 != 0;
    MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) t[e] = s[e] = 0.0f;
    mma_m16n8k8(t, row[0], row[1], student ? 0u : column);
    mma_m16n8k8(s, row[0], row[1], student ? column : 0u);
  }

  // ---- Phase 1 ----

  struct Sums {
    Numbers t[kTiles][2], s[kTiles][2];
  };

  // Square: the columns are the rows of tile `first`. Ragged: rows of the 16-row tiles first ... last - 1; with
  // `diagonal`, tile `first` has the columns' tokens.
  template <Part kPart>
  static MINILM_DEVICE void add_tile_sums(const Shared& shared, const Rows& rows, Sums& sums, const Columns& at,
                                          int row, int column, int first, int last, bool diagonal) {
    constexpr bool kMasked = kPart == Part::ragged || (kPart == Part::square && kCausal);
    const int length = kMasked ? shared.state().sequence.length : 0, bound = kMasked ? shared.state().bound : 0;
    uint32_t columns_t[2][kPlanesT], columns_s[2][kPlanesS];
    at.teacher.template load<kFormatT>(columns_t);
    at.student.template load<kFormat>(columns_s);
    float column_sums[8] = {};  // [model][n][e % 2]
    auto add_block = [&](auto square, int m, float weight) {
      constexpr bool kSquare = decltype(square)::value;
      float u_t[2][4], u_s[2][4];
      rows.template exponents<kSquare>(u_t, u_s, m, columns_t, columns_s);
      Numbers own_t = {}, own_s = {}, column_t = {}, column_s = {};
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) {
          if (e % kWide == 0) {
            store(&u_t[n][e], exponential(neighbours(&u_t[n][e]), n, e));
            store(&u_s[n][e], exponential(neighbours(&u_s[n][e]), n, e));
          }
          float x_t = u_t[n][e], x_s = u_s[n][e];
          float mirrored_t = x_t, mirrored_s = x_s;
          if (kMasked) {
            if (kPart == Part::square) {  // tokens beyond the end may get anything
              const bool hidden = own_row(m, e / 2) >= bound - row;
              if (hidden && (!kSquare || is_later(n, e))) mirrored_t = mirrored_s = 0.0f;
            } else {
              const int i = row + own_row(m, e / 2), j = column + other_column(n, e);
              if (j >= length || (kCausal && j > i && j >= bound)) x_t = x_s = 0.0f;
              if (i >= length || (kCausal && i > j && i >= bound)) mirrored_t = mirrored_s = 0.0f;
            }
          }
          append(own_t, x_t), append(own_s, x_s), append(column_t, mirrored_t), append(column_s, mirrored_s);
          if (e % kWide != kWide - 1) continue;
          if (kPart != Part::columns_only && !kSquare) {
            sums.t[m][e / 2] += own_t;
            sums.s[m][e / 2] += own_s;
          }
          float *to_t = &column_sums[2 * n + e % 2 + 1 - kWide], *to_s = to_t + 4;
          if (kPart == Part::ragged) {
            store(to_t, fused(column_t, weight, neighbours(to_t)));
            store(to_s, fused(column_s, weight, neighbours(to_s)));
          } else {
            const bool begin = (kPart == Part::square ? kSquare : m == 0) && e / 2 == 0;
            store(to_t, begin ? column_t : neighbours(to_t) + column_t);
            store(to_s, begin ? column_s : neighbours(to_s) + column_s);
          }
        }
    };
    if (kPart == Part::square) add_block(Flag<true>{}, first, 1.0f);
    MINILM_UNROLL_FOR (int m = 0; m < kTiles; ++m)
      if (meets<kPart>(m, first, last)) add_block(Flag<false>{}, m, diagonal && m == first ? 0.0f : 1.0f);
    if (kPart != Part::rows_only) *at.sums += distributed_sums(column_sums, 4);
  }

  // True if the row of element [n][e] of a square is later than its column.
  static MINILM_DEVICE bool is_later(int n, int e) {
    return e / 2 != n ? e / 2 > n : own_row(0, 0) > other_column(0, e);
  }

  // True if tile m of the rows meets the columns. Squares are computed apart.
  template <Part kPart>
  static MINILM_DEVICE bool meets(int m, int first, int last) {
    return kPart == Part::square ? m > 0 && m > first : kPart != Part::ragged || (m >= first && m < last);
  }

  static MINILM_DEVICE void add_sums(const Shared& shared, const Rows& rows, Sums& sums, int strip, int other) {
    const auto& state = shared.state();
    const int row = strip * kRows, column = other * kRows, later = max_of(row, column);
    const bool diagonal = strip == other;
    Columns at(shared, column, row >= column);
    const bool cut = kCausal && later < state.bound && later + kRows > state.bound;
    const bool ragged = later + kRows > state.sequence.length || cut;
    if (diagonal && (kCausal || !ragged)) {
      const int columns = kCausal ? tiles_of(state, other) : kTiles;
      MINILM_NO_UNROLL_FOR (int c = 0; c < columns; ++c, at.next())
        // static: begin strip-sums-square
        add_tile_sums<Part::square>(shared, rows, sums, at, row, 0, c, kTiles, false);
      // static: end strip-sums-square
    } else if (ragged) {
      const bool own = !kCausal && diagonal;
      const int last = tiles_of(state, strip), columns = tiles_of(state, other);
      MINILM_NO_UNROLL_FOR (int c = 0; c < columns; ++c, at.next())
        // static: begin strip-sums-ragged
        add_tile_sums<Part::ragged>(shared, rows, sums, at, row, column + 16 * c, own ? c : 0, last, own);
      // static: end strip-sums-ragged
    } else if (kCausal && later >= state.bound && row > column) {
      MINILM_NO_UNROLL_FOR (int c = 0; c < kTiles; ++c, at.next())
        // static: begin strip-sums-rows
        add_tile_sums<Part::rows_only>(shared, rows, sums, at, 0, 0, 0, 0, false);
      // static: end strip-sums-rows
    } else if (kCausal && later >= state.bound) {
      MINILM_NO_UNROLL_FOR (int c = 0; c < kTiles; ++c, at.next())
        // static: begin strip-sums-columns
        add_tile_sums<Part::columns_only>(shared, rows, sums, at, 0, 0, 0, 0, false);
      // static: end strip-sums-columns
    } else {
      MINILM_NO_UNROLL_FOR (int c = 0; c < kTiles; ++c) {
        // static: begin strip-sums
        add_tile_sums<Part::whole>(shared, rows, sums, at, 0, 0, 0, 0, false);
        at.next();
        // static: end strip-sums
      }
    }
  }

  static MINILM_DEVICE void write_sums(const Shared& shared, const Sums& sums, int strip) {
    const int lane = lane_index(), k = lane % 4;  // the lane that distributed_sums gives model k / 2, half k % 2
    float* at = sum_of(shared, strip * kRows + k % 2 * 8 + lane / 4, k / 2);
    MINILM_UNROLL_FOR (int m = 0; m < kTiles; ++m) {
      float x[4] = {total(sums.t[m][0]), total(sums.t[m][1]), total(sums.s[m][0]), total(sums.s[m][1])};
      at[64 * m] += distributed_sums(x, 1);
    }
  }

  // ---- Phase 2 ----

  struct Value {
    Numbers grad[2 / kWide] = {}, divergence[2 / kWide] = {};
    MINILM_DEVICE float operator()() const {
      return fmaf(-kLn2, total(divergence), total(grad)) * (1.0f / kGradScale);
    }
  };

  // Gradients of a strip's rows, of a tile of 16 rows and a chunk.
  using Grads = float[kTiles][kChunksS][4];

  // `row_factors`, `row_tokens`: a lane's addresses of the factors and of the student's tokens of the rows.
  template <Part kPart>
  static MINILM_DEVICE void add_tile_gradients(const Rows& rows, const char* row_factors, const char* row_tokens,
                                               Grads& grads, Value& value, const Columns& at, int first, int last,
                                               int bound) {
    uint32_t columns_t[2][kPlanesT], columns_s[2][kPlanesS];
    at.teacher.template load<kFormatT>(columns_t);
    at.student.template load<kFormat>(columns_s);
    const int plane = at.student.plane;
    uint32_t column_factors[kThree ? 2 : 1][2];  // [model][n]
    MINILM_UNROLL_FOR (int k = 0; k < (kThree ? 2 : 1); ++k)
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) column_factors[k][n] = load_word(at.factors + k * plane + 128 * n);
    // With one chunk, each 16 rows are done with before the next ones. More chunks share the loads of two.
    constexpr int kGroup = kChunksS == 1 ? 1 : 2;
    uint32_t y[kSplits][2];
    float column_grads[kChunksS][4];
    auto load_grads = [&](int chunk) {
      const float* from = at.grads + chunk * plane / 2;
      const Float2 upper = load_float2(from), lower = load_float2(from + 64);
      float (&sum)[4] = column_grads[chunk];
      sum[0] = upper.x, sum[1] = upper.y, sum[2] = lower.x, sum[3] = lower.y;
    };
    auto load_columns = [&](int chunk) {
      MINILM_UNROLL_FOR (int k = 0; k < kSplits; ++k)
        ldmatrix_x2_trans(y[k], grad_tokens(at.student.one, plane, k, chunk));
    };
    if (kChunksS == 1) load_columns(0);
    if constexpr (kPart == Part::square) {
      uint32_t x[kSplits][4];
      score_gradients<true>(x, rows, row_factors + 256 * first, value, columns_t, columns_s, column_factors, plane,
                            first, bound);
      MINILM_UNROLL_FOR (int chunk = 0; chunk < kChunksS; ++chunk) {
        load_grads(chunk);
        if (kChunksS > 1) load_columns(chunk);
        add_products(column_grads[chunk], x, y, 0);
        if (kCausal) add_mirrored(column_grads[chunk], x, y, 0);
      }
    }
    MINILM_UNROLL_FOR (int m = 0; m < kTiles; m += kGroup) {
      uint32_t x[kGroup][kSplits][4];  // score gradients
      MINILM_UNROLL_FOR (int k = 0; k < kGroup; ++k)
        if (meets<kPart>(m + k, first, last))
          score_gradients<false>(x[k], rows, row_factors + 256 * (m + k), value, columns_t, columns_s, column_factors,
                                 plane, m + k, bound);
      MINILM_UNROLL_FOR (int chunk = 0; chunk < kChunksS; ++chunk) {
        float (&sum)[4] = column_grads[chunk];
        if (m == 0 && kPart != Part::square) load_grads(chunk);
        if (kChunksS > 1) load_columns(chunk);
        uint32_t z[kSplits][2 * kGroup];
        MINILM_UNROLL_FOR (int k = 0; k < kSplits; ++k) {
          const char* tokens = grad_tokens(row_tokens, plane, k, chunk) + 256 * m;
          if constexpr (kGroup == 1)
            ldmatrix_x2_trans(z[k], tokens);
          else
            ldmatrix_x4_trans(z[k], tokens);
        }
        MINILM_UNROLL_FOR (int k = 0; k < kGroup; ++k) {
          if (!meets<kPart>(m + k, first, last)) continue;
          add_products(grads[m + k][chunk], x[k], y, 0);
          add_mirrored(sum, x[k], z, 2 * k);
        }
        if (m + kGroup == kTiles) {
          float* out = at.grads + chunk * plane / 2;
          store_float2(out, sum[0], sum[1]);
          store_float2(out + 64, sum[2], sum[3]);
        }
      }
    }
  }

  // sum += mᵀ · x, with the words first, first + 1 of x.
  template <int kWords>
  static MINILM_DEVICE void add_mirrored(float (&sum)[4], const uint32_t (&m)[kSplits][4],
                                         const uint32_t (&x)[kSplits][kWords], int first) {
    uint32_t mirrored[kSplits][4];
    MINILM_UNROLL_FOR (int split = 0; split < kSplits; ++split)
      MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) mirrored[split][q] = movmatrix(m[split][q / 2 + 2 * (q % 2)]);
    add_products(sum, mirrored, x, first);
  }

  // Address of a split and a chunk of the tokens that score gradients are multiplied with.
  static MINILM_DEVICE const char* grad_tokens(const char* tokens, int plane, int split, int chunk) {
    return tokens + ((kSplits == 1 ? 0 : kPlanesS + split * kChunksS) + chunk) * plane;
  }

  // sum += m · x, with the words first, first + 1 of x. Products of two splits are summed separately and added with
  // rounding to nearest, which mma does not do; the product of both small splits is left out.
  template <int kWords>
  static MINILM_DEVICE void add_products(float (&sum)[4], const uint32_t (&m)[kSplits][4],
                                         const uint32_t (&x)[kSplits][kWords], int first) {
    if constexpr (kSplits == 1) {
      multiply_add(kProducts, sum, m[0], x[0][first], x[0][first + 1]);
    } else {
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      multiply_add(kProducts, part, m[1], x[0][first], x[0][first + 1]);
      multiply_add(kProducts, part, m[0], x[1][first], x[1][first + 1]);
      multiply_add(kProducts, part, m[0], x[0][first], x[0][first + 1]);
      add_to(sum, part);
    }
  }

  // Score gradients of 16 rows, tile m of the strip, and 16 columns, packed as the first operand of mma. kSquare: they
  // are the same tokens, and m need not be a constant.
  template <bool kSquare>
  static MINILM_DEVICE void score_gradients(uint32_t (&out)[kSplits][4], const Rows& rows, const char* row_factors,
                                            Value& value, const uint32_t (&columns_t)[2][kPlanesT],
                                            const uint32_t (&columns_s)[2][kPlanesS],
                                            const uint32_t (&column_factors)[kThree ? 2 : 1][2], int plane, int m,
                                            int bound) {
    constexpr bool kTwice = kSquare && !kCausal;  // without a mask, a square has each of its pairs twice
    float u_t[2][4], u_s[2][4], factor_t[2][4], factor_s[2][4];
    rows.template exponents<kSquare>(u_t, u_s, m, columns_t, columns_s);
    if constexpr (kThree) {
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
        MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) factor_t[n][e] = factor_s[n][e] = 0.0f;
      MINILM_UNROLL_FOR (int k = 0; k < 2; ++k) {
        const char* own = row_factors + k * plane;
        const uint32_t row[2] = {load_word(own), load_word(own + 128)};
        MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
          mma_m16n8k8(k ? factor_s[n] : factor_t[n], row[0], row[1], column_factors[k][n]);
      }
    } else {
      const uint32_t own[2] = {load_word(row_factors), load_word(row_factors + 128)};
      MINILM_UNROLL_FOR (int n = 0; n < 2; ++n) factors(factor_t[n], factor_s[n], own, column_factors[0][n]);
    }
    if (kCausal && kSquare) keep_later_rows(factor_t, factor_s, bound);
    Numbers total = {}, divergence = {};
    MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
      MINILM_UNROLL_FOR (int e = 0; e < 4; e += kWide) {
        const Numbers one_t = neighbours(&u_t[n][e]), one_s = neighbours(&u_s[n][e]);
        const Numbers p = exponential(one_t, n, e) * neighbours(&factor_t[n][e]);
        const Numbers x = fused(exponential(one_s, n, e), neighbours(&factor_s[n][e]), -p);
        const int chain = kSquare ? 0 : m % 2 / kWide;
        Numbers& to = kTwice ? total : value.grad[chain];
        Numbers& to_divergence = kTwice ? divergence : value.divergence[chain];
        to += x;
        to_divergence = fused(p, one_s - one_t, to_divergence);
        store(&u_s[n][e], x);
      }
    if (kTwice) {
      value.grad[0] = fused(total, 0.5f, value.grad[0]);
      value.divergence[0] = fused(divergence, 0.5f, value.divergence[0]);
    }
    MINILM_UNROLL_FOR (int q = 0; q < 4; ++q) {
      const float low = u_s[q / 2][2 * (q % 2)], high = u_s[q / 2][2 * (q % 2) + 1];
      out[0][q] = kProducts == kFloat16 ? pack_float16(low, high) : pack_bfloat16(low, high);
      if (kSplits == 2) {
        const Float2 taken = unpack_float16(out[0][q]);
        out[kSplits - 1][q] = pack_float16(sub(low, taken.x), sub(high, taken.y));
      }
    }
  }

  // In a square of a causal relation, rows above the diagonal are earlier than their columns: these pairs are left to
  // the mirrored ones. A pair (i, i) is both of its orders at once, and its gradient has a part of its row and one of
  // its column.
  static MINILM_DEVICE void keep_later_rows(float (&factor_t)[2][4], float (&factor_s)[2][4], int bound) {
    MINILM_UNROLL_FOR (int n = 0; n < 2; ++n)
      MINILM_UNROLL_FOR (int e = 0; e < 4; ++e) {
        if (e / 2 > n) continue;  // the rows 8 ... 15 are later than the columns 0 ... 7
        const int i = own_row(0, 0), j = other_column(0, e);
        const float diagonal = i + 8 * n < bound ? 0.5f : 1.0f;
        const float weight = e / 2 < n || j > i ? 0.0f : j == i ? diagonal : 1.0f;
        factor_t[n][e] *= weight;
        factor_s[n][e] *= weight;
      }
  }

  // `own`: shared memory with the strip's tokens, `shared`: with those of the other strip.
  static MINILM_DEVICE float add_gradients(const Shared& own, const Shared& shared, const Rows& rows, Grads& grads,
                                           int strip, int other) {
    const auto& state = shared.state();
    const int row = strip * kRows, column = other * kRows, bound = state.bound;
    const bool diagonal = strip == other, later = row >= column;
    const char* row_factors = own.factors(row) + row_factor(later);
    const char* row_tokens = own.student(row).planes + lane_index() % (kChunksS == 1 ? 16 : 32) * 16;
    Columns at(shared, column, later);
    Value value;
    const bool ragged = max_of(row, column) + kRows > state.sequence.length;
    if (diagonal) {
      const int columns = tiles_of(state, other);
      MINILM_NO_UNROLL_FOR (int c = 0; c < columns; ++c, at.next())
        // static: begin strip-gradient-square
        add_tile_gradients<Part::square>(rows, row_factors, row_tokens, grads, value, at, c, kTiles,
                                         bound - column - 16 * c);
      // static: end strip-gradient-square
    } else if (ragged) {
      const int last = tiles_of(state, strip), columns = tiles_of(state, other);
      MINILM_NO_UNROLL_FOR (int c = 0; c < columns; ++c, at.next())
        // static: begin strip-gradient-ragged
        add_tile_gradients<Part::ragged>(rows, row_factors, row_tokens, grads, value, at, 0, last, 0);
      // static: end strip-gradient-ragged
    } else {
      MINILM_NO_UNROLL_FOR (int c = 0; c < kTiles; ++c) {
        // static: begin strip-gradient
        add_tile_gradients<Part::whole>(rows, row_factors, row_tokens, grads, value, at, 0, 0, 0);
        at.next();
        // static: end strip-gradient
      }
    }
    return value();
  }

  static MINILM_DEVICE void write_gradients(const Shared& shared, const Grads& grads, int strip) {
    float* at = shared.grads(strip * kRows) + lane_index() / 4 * 8 + lane_index() % 4 * 2;
    MINILM_UNROLL_FOR (int m = 0; m < kTiles; ++m)
      MINILM_UNROLL_FOR (int chunk = 0; chunk < kChunksS; ++chunk)
        MINILM_UNROLL_FOR (int half = 0; half < 2; ++half) {
          float* to = at + chunk * shared.grads_plane() + 128 * m + 64 * half;
          const float* more = grads[m][chunk] + 2 * half;
          const Float2 sum = load_float2(to);
          store_float2(to, sum.x + more[0], sum.y + more[1]);
        }
  }

  // ---- Both phases ----

  template <class State>
  static MINILM_DEVICE int tiles_of(const State& state, int strip) {  // 16-token tiles of a strip that have tokens
    return min_of(kTiles, (state.sequence.length - strip * kRows + 15) / 16);
  }

  // Returns the block's contribution to the loss, in parts per thread.
  static MINILM_DEVICE double run(const Shared& shared) {
    const auto& state = shared.state();
    const int strips = (state.sequence.length + kRows - 1) / kRows, warps = thread_count() / 32;
    for (int i = thread_index(); i < strips * kRows; i += thread_count())
      for (int plane = 0; plane < (kThree ? 2 : 1); ++plane)
        store_uint4(shared.factors(i) + plane * shared.plane(), Uint4{});
    syncthreads();
    for (int first = 0; first < strips; first += warps) {
      const int strip = first + warp_index();
      Rows rows;
      Sums sums = {};
      if (strip < strips) rows.load(shared, strip * kRows);
      for (int round = 0; 2 * round <= strips; ++round) {
        const int other = partner_of(strips, strip, round);
        if (other >= 0) add_sums(shared, rows, sums, strip, other);
        syncthreads();
      }
      if (strip < strips) write_sums(shared, sums, strip);
      syncthreads();
    }

    CompensatedSum value;
    for (int i = thread_index(); i < strips * kRows; i += thread_count()) value += invert_sums(shared, i);
    syncthreads();

    for (int first = 0; first < strips; first += warps) {
      const int strip = first + warp_index();
      Rows rows;
      Grads grads = {};
      if (strip < strips) rows.load(shared, strip * kRows);
      for (int round = 0; 2 * round <= strips; ++round) {
        const int other = partner_of(strips, strip, round);
        if (other >= 0) value += add_gradients(shared, shared, rows, grads, strip, other);
        syncthreads();
      }
      if (strip < strips) write_gradients(shared, grads, strip);
      syncthreads();
    }
    return static_cast<double>(value.sum) + value.rest;
  }

  // Replaces the sums of a token by its factors. Returns its logarithms' contribution to the loss.
  static MINILM_DEVICE float invert_sums(const Shared& shared, int i) {
    const auto& state = shared.state();
    const bool exists = i < state.sequence.length, counted = counts(state.sequence, i);
    if constexpr (!kThree) {
      const Uint4 sums = load_uint4(shared.factors(i));
      const Uint4 factors =
          factors_of(as_float(sums.word[2]), as_float(sums.word[3]), kGradScale, exists, i < state.bound, counted);
      store_uint4(shared.factors(i), factors);
      return log_ratio(factors);
    } else {
      const uint32_t seen = exists && i < state.bound ? 0x3f803f80u : 0u, ones = exists ? 0x3f803f80u : 0u;
      float inverse[2];
      MINILM_UNROLL_FOR (int model = 0; model < 2; ++model) {
        const float x = inverse[model] = kGradScale / *sum_of(shared, i, model);
        const float high = low_of(pack_bfloat16(x, 0.0f)), rest = sub(x, high);
        const uint32_t split = pack_bfloat16(high, rest), last = pack_bfloat16(sub(rest, high_of(split)), 0.0f);
        store_uint4(shared.factors(i) + model * shared.plane(),  // 0: every probability of the row is 0
                    {{seen, ones, counted ? split : 0u, counted ? last : 0u}});
      }
      return counted ? kLn2 * log2_of_ratio(inverse[0], inverse[1]) : 0.0f;
    }
  }
};

}  // namespace minilm::cuda
