// Vectors of 16 floats in 32 registers: AVX-512.
#pragma once

#pragma GCC diagnostic push  // GCC 12 warns about its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "common/numerics.h"

namespace {

using F = __m512;
using Mask = __mmask16;
constexpr int V = 16;
constexpr int kTileRows = 8, kTileBlocks = 2;  // a tile of scores keeps 16 accumulators in registers
constexpr int kGradientRows = 8;               // keeps 16 registers of factors and sums

MINILM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
MINILM_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
MINILM_INLINE F set1(float x) { return _mm512_set1_ps(x); }
MINILM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MINILM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
MINILM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MINILM_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
MINILM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
MINILM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
MINILM_INLINE Mask first_lanes(int64_t n) { return static_cast<Mask>(n <= 0 ? 0u : n >= V ? 0xffffu : (1u << n) - 1u); }
MINILM_INLINE Mask magnitude_below(F x, float bound) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(x), set1(bound), _CMP_LT_OQ);
}
MINILM_INLINE F select(Mask k, F yes, F no) { return _mm512_mask_blend_ps(k, no, yes); }
MINILM_INLINE F maskz(Mask k, F x) { return _mm512_maskz_mov_ps(k, x); }

// 2^x = 2^integer · 2^fraction with |fraction| <= 1/2.
struct Split {
  F fraction, integer;
};
MINILM_INLINE Split split(F x) {
  F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {sub(x, n), n};
}
MINILM_INLINE F scale_by_power(F x, Split s, F) { return _mm512_scalef_ps(x, s.integer); }

// Exchange neighbouring groups of 8, 4, 2 and 1 lanes.
MINILM_INLINE F swap_8(F x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }
MINILM_INLINE F swap_4(F x) { return _mm512_shuffle_f32x4(x, x, 0xb1); }
MINILM_INLINE F swap_2(F x) { return _mm512_permute_ps(x, 0x4e); }
MINILM_INLINE F swap_1(F x) { return _mm512_permute_ps(x, 0xb1); }
MINILM_INLINE float sum_lanes(F x) {
  x = add(x, swap_8(x));
  x = add(x, swap_4(x));
  x = add(x, swap_2(x));
  return _mm512_cvtss_f32(add(x, swap_1(x)));
}
MINILM_INLINE float max_lanes(F x) {
  x = max(x, swap_8(x));
  x = max(x, swap_4(x));
  x = max(x, swap_2(x));
  return _mm512_cvtss_f32(max(x, swap_1(x)));
}

// A quad is a group of four lanes. Quad q is loaded from rows[4q] + at, and stored at rows[4q].
MINILM_INLINE F load_quads(const float* const* rows, int64_t at) {
  F x = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[4] + at), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[8] + at), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(rows[12] + at), 3);
}
MINILM_INLINE void store_quads(float* const* rows, F x) {
  _mm_storeu_ps(rows[0], _mm512_castps512_ps128(x));
  _mm_storeu_ps(rows[4], _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(rows[8], _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(rows[12], _mm512_extractf32x4_ps(x, 3));
}
MINILM_INLINE void transpose_quads(F x[4]) {
  F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  F c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xee);
  x[2] = _mm512_shuffle_ps(b, d, 0x44);
  x[3] = _mm512_shuffle_ps(b, d, 0xee);
}
MINILM_INLINE void store_sum_of_quads(float* to, F x) {
  x = add(x, swap_8(x));
  _mm_storeu_ps(to, _mm512_castps512_ps128(add(x, swap_4(x))));
}

// Even and odd lanes. set1_pair: even lanes get p[0], odd lanes get p[1]. dup_even, dup_odd: an even lane and the odd
// lane after it both get the value of the even (odd) one. blend: even lanes are those of a, odd lanes those of b.
MINILM_INLINE F set1_pair(const float* p) {
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
MINILM_INLINE F dup_even(F x) { return _mm512_moveldup_ps(x); }
MINILM_INLINE F dup_odd(F x) { return _mm512_movehdup_ps(x); }
MINILM_INLINE F blend(F a, F b) { return _mm512_mask_blend_ps(0xaaaa, a, b); }
// Stores the even lanes at a and the odd lanes at b.
MINILM_INLINE void store_halves(float* a, float* b, F x) {
  x = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), x);
  _mm256_storeu_ps(a, _mm512_castps512_ps256(x));
  _mm256_storeu_ps(b, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}

}  // namespace
