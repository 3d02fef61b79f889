// AVX-512 kernels: 16 lanes, 32 registers. Flags: -mavx512f -mfma.
#pragma GCC diagnostic push  // GCC 12 warns about its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define INLINE static inline __attribute__((always_inline))

namespace {

using F = __m512;
using Keep = __mmask16;
constexpr int V = 16;
constexpr int kTileRows = 8, kTileBlocks = 2;    // scores: 16 accumulators
constexpr int kGradientRows = 8;  // of a chunk of one vector: 16 registers of factors and sums

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F all(float x) { return _mm512_set1_ps(x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
INLINE Keep first_lanes(int64_t n) {
  return static_cast<Keep>(n <= 0 ? 0u : n >= V ? 0xffffu : (1u << n) - 1u);
}
INLINE Keep magnitude_below(F x, float bound) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), all(bound), _CMP_LT_OQ); }
INLINE F choose(Keep k, F yes, F no) { return _mm512_mask_blend_ps(k, no, yes); }
INLINE F keep(Keep k, F x) { return _mm512_maskz_mov_ps(k, x); }

// 2^x = 2^n · 2^r.
struct Split { F rest; F whole; };
INLINE Split split(F x) {
  F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {sub(x, n), n};
}
INLINE F times_power(F x, Split s, F) { return _mm512_scalef_ps(x, s.whole); }

// The other half of the lanes, of quarters, of eighths, of sixteenths.
INLINE F swap_halves(F x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }
INLINE F swap_quarters(F x) { return _mm512_shuffle_f32x4(x, x, 0xb1); }
INLINE F swap_eighths(F x) { return _mm512_permute_ps(x, 0x4e); }
INLINE F swap_sixteenths(F x) { return _mm512_permute_ps(x, 0xb1); }
INLINE float sum_lanes(F x) {
  x = add(x, swap_halves(x));
  x = add(x, swap_quarters(x));
  x = add(x, swap_eighths(x));
  return _mm512_cvtss_f32(add(x, swap_sixteenths(x)));
}
INLINE float max_lanes(F x) {
  x = larger(x, swap_halves(x));
  x = larger(x, swap_quarters(x));
  x = larger(x, swap_eighths(x));
  return _mm512_cvtss_f32(larger(x, swap_sixteenths(x)));
}

// A quad: four floats. Lanes 4q … 4q + 3 hold the quad at rows[4q] + at.
INLINE F load_quads(const float* const* rows, int64_t at) {
  F x = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[4] + at), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[8] + at), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(rows[12] + at), 3);
}
INLINE void store_quads(float* const* rows, F x) {
  _mm_storeu_ps(rows[0], _mm512_castps512_ps128(x));
  _mm_storeu_ps(rows[4], _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(rows[8], _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(rows[12], _mm512_extractf32x4_ps(x, 3));
}
INLINE void transpose_quads(F x[4]) {
  F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  F c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xee);
  x[2] = _mm512_shuffle_ps(b, d, 0x44);
  x[3] = _mm512_shuffle_ps(b, d, 0xee);
}
INLINE void store_sum_of_quads(float* to, F x) {
  x = add(x, swap_halves(x));
  _mm_storeu_ps(to, _mm512_castps512_ps128(add(x, swap_quarters(x))));
}

// Lanes go in pairs: all from p; both from the even lane, or the odd one; even lanes of a beside odd lanes of b.
INLINE F all_pair(const float* p) {
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
INLINE F twice_even(F x) { return _mm512_moveldup_ps(x); }
INLINE F twice_odd(F x) { return _mm512_movehdup_ps(x); }
INLINE F mix(F a, F b) { return _mm512_mask_blend_ps(0xaaaa, a, b); }
// Even lanes go to a, odd ones to b.
INLINE void store_halves(float* a, float* b, F x) {
  x = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), x);
  _mm256_storeu_ps(a, _mm512_castps512_ps256(x));
  _mm256_storeu_ps(b, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}

}  // namespace

#define KERNELS kernels_avx512
#include "kernels.inl"
