// AVX-512 kernels. Compiled with -mavx512f -mfma.
#include "simd_avx512.h"

#define MINILM_KERNELS kernels_avx512
#include "kernels.inl"
