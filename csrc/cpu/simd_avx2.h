// Vectors of 8 floats in 16 registers: AVX2.
#pragma once

#include <immintrin.h>

#include "common/numerics.h"

namespace {

using F = __m256;
using Mask = __m256;
constexpr int V = 8;
constexpr int kTileRows = 4, kTileBlocks = 2;  // a tile of scores keeps 8 accumulators in registers
constexpr int kGradientRows = 4;               // keeps 8 registers of factors and sums

MINILM_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
MINILM_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
MINILM_INLINE F set1(float x) { return _mm256_set1_ps(x); }
MINILM_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
MINILM_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
MINILM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
MINILM_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
MINILM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
MINILM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
MINILM_INLINE Mask first_lanes(int64_t n) {
  return _mm256_cmp_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), set1(static_cast<float>(n)), _CMP_LT_OQ);
}
MINILM_INLINE Mask magnitude_below(F x, float bound) {
  return _mm256_cmp_ps(_mm256_andnot_ps(set1(-0.0f), x), set1(bound), _CMP_LT_OQ);
}
MINILM_INLINE F select(Mask k, F yes, F no) { return _mm256_blendv_ps(no, yes, k); }
MINILM_INLINE F maskz(Mask k, F x) { return _mm256_and_ps(k, x); }

// 2^x = 2^n · 2^fraction with |fraction| <= 1/2. Adding `magic` rounds x to an integer n and leaves n + 127 in the low
// bits of `integer`. Results below 2^-126 are 0; NaN stays NaN.
struct Split {
  F fraction, integer;
};
MINILM_INLINE Split split(F x) {
  F magic = set1(12582912.0f + 127.0f);
  F n = add(x, magic);
  return {sub(x, sub(n, magic)), n};
}
MINILM_INLINE F scale_by_power(F y, Split s, F x) {
  F power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(s.integer), 23));
  return maskz(_mm256_cmp_ps(x, set1(-126.0f), _CMP_NLT_UQ), mul(y, power));
}

MINILM_INLINE float sum_lanes(F x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
MINILM_INLINE float max_lanes(F x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

// A quad is a group of four lanes. Quad q is loaded from rows[4q] + at, and stored at rows[4q].
MINILM_INLINE F load_quads(const float* const* rows, int64_t at) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at)), _mm_loadu_ps(rows[4] + at), 1);
}
MINILM_INLINE void store_quads(float* const* rows, F x) {
  _mm_storeu_ps(rows[0], _mm256_castps256_ps128(x));
  _mm_storeu_ps(rows[4], _mm256_extractf128_ps(x, 1));
}
MINILM_INLINE void transpose_quads(F x[4]) {
  F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
  F c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
  x[0] = _mm256_shuffle_ps(a, c, 0x44);
  x[1] = _mm256_shuffle_ps(a, c, 0xee);
  x[2] = _mm256_shuffle_ps(b, d, 0x44);
  x[3] = _mm256_shuffle_ps(b, d, 0xee);
}
MINILM_INLINE void store_sum_of_quads(float* to, F x) {
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

// Even and odd lanes. set1_pair: even lanes get p[0], odd lanes get p[1]. dup_even, dup_odd: an even lane and the odd
// lane after it both get the value of the even (odd) one. blend: even lanes are those of a, odd lanes those of b.
MINILM_INLINE F set1_pair(const float* p) {
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
MINILM_INLINE F dup_even(F x) { return _mm256_moveldup_ps(x); }
MINILM_INLINE F dup_odd(F x) { return _mm256_movehdup_ps(x); }
MINILM_INLINE F blend(F a, F b) { return _mm256_blend_ps(a, b, 0xaa); }
// Stores the even lanes at a and the odd lanes at b.
MINILM_INLINE void store_halves(float* a, float* b, F x) {
  x = _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  _mm_storeu_ps(a, _mm256_castps256_ps128(x));
  _mm_storeu_ps(b, _mm256_extractf128_ps(x, 1));
}

}  // namespace
