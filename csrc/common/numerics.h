// Numerics shared by the CPU kernels, the CUDA kernels and their host code. Compiles without a C++ library under NVRTC.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#define MINILM_INLINE __device__ __forceinline__
#else
#include <cstddef>
#include <cstdint>
// Functions have internal linkage: the linker must never replace a function that is compiled for one instruction set by
// the same function compiled for another.
#define MINILM_INLINE static inline __attribute__((always_inline))
#endif

namespace minilm {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.44269504088896341f;

// Score of a masked key. Its exponential is 0. Unlike -infinity, it never produces NaN.
constexpr float kNegInf = -1e30f;

// Coefficients of a minimax polynomial of 2^r for |r| <= 1/2 with p(0) = 1. Its relative error is 2e-8 before rounding.
constexpr float kExp2C6 = 1.53533619e-4f;
constexpr float kExp2C5 = 1.33988744e-3f;
constexpr float kExp2C4 = 9.61843736e-3f;
constexpr float kExp2C3 = 5.55033247e-2f;
constexpr float kExp2C2 = 2.40226479e-1f;
constexpr float kExp2C1 = 6.93147203e-1f;

struct Range {
  float low, high;
};

MINILM_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

MINILM_INLINE float as_float(uint32_t bits) {
#if defined(__CUDACC_RTC__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

MINILM_INLINE uint32_t as_bits(float x) {
#if defined(__CUDACC_RTC__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MINILM_INLINE float bfloat16_to_float(uint32_t bits) { return as_float(bits << 16); }

// Exact for every float16, subnormal numbers included.
MINILM_INLINE float float16_to_float(uint32_t bits) {
  uint32_t magnitude = bits & 0x7fffu;
  float value = magnitude < 0x7c00u ? as_float(magnitude << 13) * 0x1p112f : as_float(0x7f800000u | magnitude << 13);
  return bits & 0x8000u ? -value : value;
}

}  // namespace minilm
