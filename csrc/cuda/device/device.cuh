// What the kernels need of a GPU, one function an instruction. With MINILM_EMULATED the same names come from a thread
// block emulated on the host (tests/relation/backends/cuda/emulated.h), so that tests run the kernels as they are.
#pragma once

#include "types.h"

#if defined(MINILM_EMULATED)

#include "emulated.h"

#else

#define MINILM_DEVICE __device__ __forceinline__
#define MINILM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MINILM_PARAMETER __grid_constant__
#define MINILM_UNROLL _Pragma("unroll")
#define MINILM_NO_UNROLL _Pragma("unroll 1")

namespace minilm::cuda {

MINILM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MINILM_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
MINILM_DEVICE int64_t block_index() { return blockIdx.x; }

MINILM_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

MINILM_DEVICE void sync_block() { __syncthreads(); }
MINILM_DEVICE void sync_warp() { __syncwarp(); }
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
MINILM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MINILM_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Two bfloat16, rounded to nearest even, `low` in the lower half.
MINILM_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Of four 8×8 matrices of 16-bit elements, one 16-byte row a lane (lanes 8k … 8k + 7: matrix k): lane 4g + t gets
// elements (g, 2t) and (g, 2t + 1) of each, or, transposed, (2t, g) and (2t + 1, g).
MINILM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MINILM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MINILM_DEVICE uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a · b for bfloat16 a (16 × K) and b (K × 8), float32 c (16 × 8); K = 8 or 16. Lane 4g + t holds
// c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1);  a: (g, 2t…), (g + 8, 2t…), then the same of k + 8;
// b: (2t…, g), then the same of k + 8.
MINILM_DEVICE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
MINILM_DEVICE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Words {  // 16 bytes
  uint32_t word[4];
};
MINILM_DEVICE Words load_words(const void* from) {
  uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
MINILM_DEVICE void store_words(void* to, const Words& x) {
  *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
struct Pair {  // 8 bytes
  float x, y;
};
MINILM_DEVICE Pair load_pair(const float* from) {
  float2 v = *reinterpret_cast<const float2*>(from);
  return {v.x, v.y};
}
MINILM_DEVICE void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }

}  // namespace minilm::cuda

#endif
