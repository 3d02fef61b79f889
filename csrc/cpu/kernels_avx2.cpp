// AVX2 kernels. Compiled with -mavx2 -mfma.
#include "simd_avx2.h"

#define MINILM_KERNELS kernels_avx2
#include "kernels.inl"
