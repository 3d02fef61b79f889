// Kernels whose cost a pair can be counted by hand: a thread is a row, an element of `x` a column, e = 2^(x a + b).

__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A column: one FFMA, one MUFU.EX2, one FFMA; a quarter of a 16-byte load from shared memory. A trip: four columns.
template <int kUnroll>
__global__ void unrolled(const float* x, float* y, int trips) {
  extern __shared__ float4 columns[];
  columns[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
  __syncthreads();
  const float a = x[threadIdx.x], b = x[threadIdx.x + 1], c = x[threadIdx.x + 2];
  float sum = 0;
#pragma unroll kUnroll
  for (int j = 0; j < trips; ++j) {
    const float4 v = columns[j];
    sum = fmaf(exp2_(fmaf(v.x, a, b)), c, sum);
    sum = fmaf(exp2_(fmaf(v.y, a, b)), c, sum);
    sum = fmaf(exp2_(fmaf(v.z, a, b)), c, sum);
    sum = fmaf(exp2_(fmaf(v.w, a, b)), c, sum);
  }
  y[threadIdx.x] = sum;
}
template __global__ void unrolled<1>(const float*, float*, int);

// The same with a whole number of eightfold trips, so that the compiler leaves no remainder loop.
template <int kTrips>
__global__ void fixed_trips(const float* x, float* y) {
  const float a = x[threadIdx.x], b = x[threadIdx.x + 1], c = x[threadIdx.x + 2];
  float sum = 0;
#pragma unroll 8
  for (int j = 0; j < kTrips; ++j) sum = fmaf(exp2_(fmaf(sum, a, b)), c, sum);
  y[threadIdx.x] = sum;
}
template __global__ void fixed_trips<512>(const float*, float*);

// An inner loop of 64 columns inside a loop over rows that stores each row's sum.
__global__ void nested(const float* x, float* y, int rows) {
  const float a = x[threadIdx.x], b = x[threadIdx.x + 1];
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    float sum = 0;
#pragma unroll 1
    for (int j = 0; j < 64; ++j) sum += exp2_(fmaf(sum, a, b));
    y[i * 32 + threadIdx.x] = sum;
  }
}

// One helper inlined twice; the second call, the boundary, has a predicate.
template <bool kMasked>
__device__ __forceinline__ float columns_of(const float* x, int first, int last, float a) {
  float sum = 0;
#pragma unroll 1
  for (int j = first; j < last; ++j) {
    const float e = exp2_(__ldg(x + j) * a);
    sum += !kMasked || j % 3 == 0 ? e : 0.0f;
  }
  return sum;
}
__global__ void boundary(const float* x, float* y, int n) {
  const float a = x[n + threadIdx.x];
  // static: begin main
  float sum = columns_of<false>(x, 0, n, a);
  // static: end main
  // static: begin boundary
  sum += columns_of<true>(x, n, 2 * n, a);
  // static: end boundary
  y[threadIdx.x] = sum;
}

// A branch that a warp takes only where a column is large: in the loop, but not on every trip.
__global__ void slow_path(const float* x, float* y, int n) {
  float sum = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < n; j += 32) {
    float e = exp2_(x[j]);
    if (e > 1e6f) {
#pragma unroll 1
      for (int k = 0; k < 5; ++k) e = sqrtf(e + x[j + k]);
    }
    sum += e;
  }
  y[threadIdx.x] = sum;
}

// One loop with two sides, too long to be predicated: an exponential and 25 or 13 FFMA.
__global__ void two_sides(const float* x, float* y, int n) {
  const float a = x[n], b = x[n + 1];
  float sum = 0;
#pragma unroll 1
  for (int j = 0; j < n; ++j) {
    if (j % 7 == 3) {
      // static: begin long
      float e = exp2_(fmaf(sum, a, b));
#pragma unroll
      for (int k = 0; k < 24; ++k) e = fmaf(e, e, a);
      sum = e;
      // static: end long
    } else {
      // static: begin short
      float e = exp2_(fmaf(sum, b, a));
#pragma unroll
      for (int k = 0; k < 12; ++k) e = fmaf(e, e, b);
      sum = e;
      // static: end short
    }
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// 96 running sums in the 32 registers that this launch bound leaves: they spill.
__global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y, int n) {
  float sums[96];
#pragma unroll
  for (int k = 0; k < 96; ++k) sums[k] = x[k * 1024 + threadIdx.x];
#pragma unroll 1
  for (int j = 0; j < n; ++j) {
    const float v = x[j];
#pragma unroll
    for (int k = 0; k < 96; ++k) sums[k] += exp2_(v * sums[k]);
  }
#pragma unroll
  for (int k = 0; k < 96; ++k) y[k * 1024 + threadIdx.x] = sums[k];
}
