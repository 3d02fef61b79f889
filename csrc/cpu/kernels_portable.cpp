// Kernels for any processor.
#include "simd_portable.h"

#define MINILM_KERNELS kernels_portable
#include "kernels.inl"
