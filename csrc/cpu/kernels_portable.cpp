// Kernels for any processor: 4 lanes by the compiler's vector extensions (SSE2, NEON, or plain scalars).
#include <cstdint>
#include <cstring>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t Keep __attribute__((vector_size(16)));
constexpr int V = 4;
constexpr int kTileRows = 4, kTileBlocks = 2;  // scores: 8 accumulators
constexpr int kGradientRows = 4;  // of a chunk of one vector: 8 registers of factors and sums

INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
INLINE F all(float x) { return F{x, x, x, x}; }
INLINE F add(F a, F b) { return a + b; }
INLINE F sub(F a, F b) { return a - b; }
INLINE F mul(F a, F b) { return a * b; }
INLINE F div(F a, F b) { return a / b; }
INLINE F fma(F a, F b, F c) {
#if defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE F keep(Keep k, F x) { return (F)(k & (Keep)x); }
INLINE F choose(Keep k, F yes, F no) { return (F)((k & (Keep)yes) | (~k & (Keep)no)); }
INLINE F larger(F a, F b) { return choose(a > b, a, b); }
INLINE Keep first_lanes(int64_t n) { return F{0, 1, 2, 3} < all(static_cast<float>(n)); }
INLINE Keep magnitude_below(F x, float bound) { return (F)((Keep)x & INT32_MAX) < all(bound); }

// 2^x = 2^n · 2^r; adding `magic` leaves n + 127 in the low bits. Below 2^-126 the result is 0; NaN stays NaN.
struct Split { F rest; F whole; };
INLINE Split split(F x) {
  F magic = all(12582912.0f + 127.0f);
  F n = x + magic;
  return {x - (n - magic), n};
}
INLINE F times_power(F y, Split s, F x) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return keep(~(x < all(-126.0f)), y * (F)((Bits)s.whole << 23));
}

INLINE float sum_lanes(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE float max_lanes(F x) {
  float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// A quad: four floats. Here it is the whole vector.
INLINE F load_quads(const float* const* rows, int64_t at) { return load(rows[0] + at); }
INLINE void store_quads(float* const* rows, F x) { store(rows[0], x); }
INLINE void transpose_quads(F x[4]) {
  F a = x[0], b = x[1], c = x[2], d = x[3];
  x[0] = F{a[0], b[0], c[0], d[0]};
  x[1] = F{a[1], b[1], c[1], d[1]};
  x[2] = F{a[2], b[2], c[2], d[2]};
  x[3] = F{a[3], b[3], c[3], d[3]};
}
INLINE void store_sum_of_quads(float* to, F x) { store(to, x); }

// Lanes go in pairs: all from p; both from the even lane, or the odd one; even lanes of a beside odd lanes of b.
INLINE F all_pair(const float* p) { return F{p[0], p[1], p[0], p[1]}; }
INLINE F twice_even(F x) { return F{x[0], x[0], x[2], x[2]}; }
INLINE F twice_odd(F x) { return F{x[1], x[1], x[3], x[3]}; }
INLINE F mix(F a, F b) { return F{a[0], b[1], a[2], b[3]}; }
// Even lanes go to a, odd ones to b.
INLINE void store_halves(float* a, float* b, F x) {
  a[0] = x[0];
  a[1] = x[2];
  b[0] = x[1];
  b[1] = x[3];
}

}  // namespace

#define KERNELS kernels_portable
#include "kernels.inl"
