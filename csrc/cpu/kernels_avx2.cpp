// AVX2 kernels: 8 lanes, 16 registers. Flags: -mavx2 -mfma.
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

namespace {

using F = __m256;
using Keep = __m256;
constexpr int V = 8;
constexpr int kTileRows = 4, kTileBlocks = 2;  // scores: 8 accumulators
constexpr int kGradientRows = 4;  // of a chunk of one vector: 8 registers of factors and sums

INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INLINE F all(float x) { return _mm256_set1_ps(x); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
INLINE Keep first_lanes(int64_t n) {
  return _mm256_cmp_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), all(static_cast<float>(n)), _CMP_LT_OQ);
}
INLINE Keep magnitude_below(F x, float bound) {
  return _mm256_cmp_ps(_mm256_andnot_ps(all(-0.0f), x), all(bound), _CMP_LT_OQ);
}
INLINE F choose(Keep k, F yes, F no) { return _mm256_blendv_ps(no, yes, k); }
INLINE F keep(Keep k, F x) { return _mm256_and_ps(k, x); }

// 2^x = 2^n · 2^r; adding `magic` leaves n + 127 in the low bits. Below 2^-126 the result is 0; NaN stays NaN.
struct Split { F rest; F whole; };
INLINE Split split(F x) {
  F magic = all(12582912.0f + 127.0f);
  F n = add(x, magic);
  return {sub(x, sub(n, magic)), n};
}
INLINE F times_power(F y, Split s, F x) {
  F power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(s.whole), 23));
  return keep(_mm256_cmp_ps(x, all(-126.0f), _CMP_NLT_UQ), mul(y, power));
}

INLINE float sum_lanes(F x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE float max_lanes(F x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

// A quad: four floats. Lanes 4q … 4q + 3 hold the quad at rows[4q] + at.
INLINE F load_quads(const float* const* rows, int64_t at) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at)), _mm_loadu_ps(rows[4] + at), 1);
}
INLINE void store_quads(float* const* rows, F x) {
  _mm_storeu_ps(rows[0], _mm256_castps256_ps128(x));
  _mm_storeu_ps(rows[4], _mm256_extractf128_ps(x, 1));
}
INLINE void transpose_quads(F x[4]) {
  F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
  F c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
  x[0] = _mm256_shuffle_ps(a, c, 0x44);
  x[1] = _mm256_shuffle_ps(a, c, 0xee);
  x[2] = _mm256_shuffle_ps(b, d, 0x44);
  x[3] = _mm256_shuffle_ps(b, d, 0xee);
}
INLINE void store_sum_of_quads(float* to, F x) {
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

// Lanes go in pairs: all from p; both from the even lane, or the odd one; even lanes of a beside odd lanes of b.
INLINE F all_pair(const float* p) {
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
INLINE F twice_even(F x) { return _mm256_moveldup_ps(x); }
INLINE F twice_odd(F x) { return _mm256_movehdup_ps(x); }
INLINE F mix(F a, F b) { return _mm256_blend_ps(a, b, 0xaa); }
// Even lanes go to a, odd ones to b.
INLINE void store_halves(float* a, float* b, F x) {
  x = _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  _mm_storeu_ps(a, _mm256_castps256_ps128(x));
  _mm_storeu_ps(b, _mm256_extractf128_ps(x, 1));
}

}  // namespace

#define KERNELS kernels_avx2
#include "kernels.inl"
