// GPU instructions as functions. With MINILM_EMULATED, tests/relation/backends/cuda/emulated.h defines the same
// functions for a thread block that is emulated on the host, so that tests run the unchanged kernels.
#pragma once

#include "common/numerics.h"

#if defined(MINILM_EMULATED)

#include "emulated.h"

#else

#define MINILM_DEVICE __device__ __forceinline__
#define MINILM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MINILM_PARAMETER __grid_constant__
#define MINILM_UNROLL_FOR(...) _Pragma("unroll") for (__VA_ARGS__)
#define MINILM_NO_UNROLL_FOR(...) _Pragma("unroll 1") for (__VA_ARGS__)

namespace minilm::cuda {

constexpr int kCapability = __CUDA_ARCH__ / 10;  // 90 for compute capability 9.0

MINILM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MINILM_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
MINILM_DEVICE int64_t block_index() { return blockIdx.x; }

MINILM_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Hides a number from the compiler: loops whose bounds depend on it are not unrolled.
MINILM_DEVICE void hide_value(int& x) { asm volatile("" : "+r"(x)); }

MINILM_DEVICE void syncthreads() { __syncthreads(); }
MINILM_DEVICE void syncwarp() { __syncwarp(); }
MINILM_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
MINILM_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

MINILM_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MINILM_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }  // never contracted or reordered
MINILM_DEVICE float sub(float x, float y) { return __fsub_rn(x, y); }
MINILM_DEVICE float mul(float x, float y) { return __fmul_rn(x, y); }

struct Float2 {
  float x, y;
};

// Two numbers in one instruction, which needs compute capability 10.0.
MINILM_DEVICE uint64_t join(const Float2& pair) {
  uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(pair.x), "f"(pair.y));
  return bits;
}
MINILM_DEVICE Float2 separate(uint64_t bits) {
  Float2 pair;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(pair.x), "=f"(pair.y) : "l"(bits));
  return pair;
}
MINILM_DEVICE Float2 operator+(const Float2& a, const Float2& b) {
  uint64_t sum;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(sum) : "l"(join(a)), "l"(join(b)));
  return separate(sum);
}
MINILM_DEVICE Float2 operator-(const Float2& a, const Float2& b) {
  uint64_t difference;
  asm("sub.rn.f32x2 %0, %1, %2;" : "=l"(difference) : "l"(join(a)), "l"(join(b)));
  return separate(difference);
}
MINILM_DEVICE Float2 operator*(const Float2& a, const Float2& b) {
  uint64_t product;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(product) : "l"(join(a)), "l"(join(b)));
  return separate(product);
}
MINILM_DEVICE Float2 fused(const Float2& a, const Float2& b, const Float2& c) {  // a · b + c, rounded once
  uint64_t sum;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(sum) : "l"(join(a)), "l"(join(b)), "l"(join(c)));
  return separate(sum);
}

// Packs two numbers as bfloat16, rounded to nearest even. `low` is in the lower 16 bits.
MINILM_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The same as float16.
MINILM_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

MINILM_DEVICE Float2 unpack_float16(uint32_t packed) {
  Float2 pair;
  asm("cvt.f32.f16 %0, %1;" : "=f"(pair.x) : "h"(static_cast<uint16_t>(packed)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(pair.y) : "h"(static_cast<uint16_t>(packed >> 16)));
  return pair;
}

// Loads four 8×8 matrices of 16-bit elements. Lane 8k + i passes the address of row i (16 bytes) of matrix k. Lane 4g +
// t receives the elements (g, 2t) and (g, 2t + 1) of each matrix or, if transposed, (2t, g) and (2t + 1, g).
MINILM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MINILM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same for two matrices, with the addresses of lanes 0 to 15.
MINILM_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
MINILM_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
// Transposes an 8×8 matrix of 16-bit elements. The lanes hold it in the layout of ldmatrix_x4.
MINILM_DEVICE uint32_t movmatrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a · b with a (16 × K) and b (K × 8) in bfloat16 or, with kHalf, float16, and float32 c (16 × 8). Lane 4g + t
// holds the elements
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a: two each at (g, 2t) and (g + 8, 2t); with K = 16 also at (g, 2t + 8) and (g + 8, 2t + 8)
//   b: two at (2t, g); with K = 16 also at (2t + 8, g)
template <bool kHalf = false>
MINILM_DEVICE void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if (kHalf)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
template <bool kHalf = false>
MINILM_DEVICE void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  if (kHalf)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Uint4 {
  uint32_t word[4];
};
MINILM_DEVICE Uint4 load_uint4(const void* from) {
  uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
MINILM_DEVICE void store_uint4(void* to, const Uint4& x) {
  *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
// Copies 16 bytes from global to shared memory, or writes zeros. They have arrived after wait_for_copies().
MINILM_DEVICE void copy_or_clear(void* to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)),
                 "r"(copy ? 16 : 0)
               : "memory");
}
MINILM_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
MINILM_DEVICE uint32_t load_word(const void* from) { return *static_cast<const uint32_t*>(from); }
MINILM_DEVICE Float2 load_float2(const float* from) {
  float2 v = *reinterpret_cast<const float2*>(from);
  return {v.x, v.y};
}
MINILM_DEVICE void store_float2(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }

}  // namespace minilm::cuda

#endif
