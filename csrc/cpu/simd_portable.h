// Vectors of 4 floats by the compiler's vector extensions: SSE2, NEON, or scalar code.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/numerics.h"

namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int V = 4;
constexpr int kTileRows = 4, kTileBlocks = 2;  // a tile of scores keeps 8 accumulators in registers
constexpr int kGradientRows = 4;               // keeps 8 registers of factors and sums

MINILM_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MINILM_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
MINILM_INLINE F set1(float x) { return F{x, x, x, x}; }
MINILM_INLINE F add(F a, F b) { return a + b; }
MINILM_INLINE F sub(F a, F b) { return a - b; }
MINILM_INLINE F mul(F a, F b) { return a * b; }
MINILM_INLINE F div(F a, F b) { return a / b; }
MINILM_INLINE F fma(F a, F b, F c) {
#if defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
MINILM_INLINE F maskz(Mask k, F x) { return (F)(k & (Mask)x); }
MINILM_INLINE F select(Mask k, F yes, F no) { return (F)((k & (Mask)yes) | (~k & (Mask)no)); }
MINILM_INLINE F max(F a, F b) { return select(a > b, a, b); }
MINILM_INLINE Mask first_lanes(int64_t n) { return F{0, 1, 2, 3} < set1(static_cast<float>(n)); }
MINILM_INLINE Mask magnitude_below(F x, float bound) { return (F)((Mask)x & INT32_MAX) < set1(bound); }

// 2^x = 2^n · 2^fraction with |fraction| <= 1/2. Adding `magic` rounds x to an integer n and leaves n + 127 in the low
// bits of `integer`. Results below 2^-126 are 0; NaN stays NaN.
struct Split {
  F fraction, integer;
};
MINILM_INLINE Split split(F x) {
  F magic = set1(12582912.0f + 127.0f);
  F n = x + magic;
  return {x - (n - magic), n};
}
MINILM_INLINE F scale_by_power(F y, Split s, F x) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return maskz(~(x < set1(-126.0f)), y * (F)((Bits)s.integer << 23));
}

MINILM_INLINE float sum_lanes(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
MINILM_INLINE float max_lanes(F x) {
  float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// A quad is a group of four lanes: here the whole vector.
MINILM_INLINE F load_quads(const float* const* rows, int64_t at) { return load(rows[0] + at); }
MINILM_INLINE void store_quads(float* const* rows, F x) { store(rows[0], x); }
MINILM_INLINE void transpose_quads(F x[4]) {
  F a = x[0], b = x[1], c = x[2], d = x[3];
  x[0] = F{a[0], b[0], c[0], d[0]};
  x[1] = F{a[1], b[1], c[1], d[1]};
  x[2] = F{a[2], b[2], c[2], d[2]};
  x[3] = F{a[3], b[3], c[3], d[3]};
}
MINILM_INLINE void store_sum_of_quads(float* to, F x) { store(to, x); }

// Even and odd lanes. set1_pair: even lanes get p[0], odd lanes get p[1]. dup_even, dup_odd: an even lane and the odd
// lane after it both get the value of the even (odd) one. blend: even lanes are those of a, odd lanes those of b.
MINILM_INLINE F set1_pair(const float* p) { return F{p[0], p[1], p[0], p[1]}; }
MINILM_INLINE F dup_even(F x) { return F{x[0], x[0], x[2], x[2]}; }
MINILM_INLINE F dup_odd(F x) { return F{x[1], x[1], x[3], x[3]}; }
MINILM_INLINE F blend(F a, F b) { return F{a[0], b[1], a[2], b[3]}; }
// Stores the even lanes at a and the odd lanes at b.
MINILM_INLINE void store_halves(float* a, float* b, F x) {
  a[0] = x[0];
  a[1] = x[2];
  b[0] = x[1];
  b[1] = x[3];
}

}  // namespace
