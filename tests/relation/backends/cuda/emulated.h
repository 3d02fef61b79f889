// A thread block emulated on the host. Implements the functions of csrc/cuda/device/ptx.cuh for kernels that a C++
// compiler has compiled.
//
// Each CUDA thread is a fiber. Warp-wide instructions (ldmatrix, mma, shuffles) wait for all 32 lanes and fail if the
// lanes execute different instructions. Warps run in a random order drawn from `seed`, so that a missing barrier
// changes the result. Shared memory is filled with NaN, ends at an inaccessible page and has exactly the planned size.
// The numerics are the worst case that the documentation allows: ex2.approx has errors of up to 2^-22, and mma adds
// eight products at a time, each of which is truncated 24 bits below the largest one.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/numerics.h"

#define MINILM_DEVICE inline
#define MINILM_KERNEL(threads, blocks) void
#define MINILM_PARAMETER
#define MINILM_UNROLL_FOR(...) for (__VA_ARGS__)
#define MINILM_NO_UNROLL_FOR(...) for (__VA_ARGS__)

namespace minilm::cuda {
namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated thread block: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  uint32_t words[4];
};

typedef void* Registers[5];  // much faster than jmp_buf

struct Fiber {
  Registers registers;
  const int* waits_for = nullptr;  // the thread is blocked as long as this equals `seen`
  int seen = 0;
  bool started = false, done = true;
  std::vector<Copy> copies;  // cp.async
};

struct Warp {
  int arrived = 0, generation = 0;
  const char* instruction = nullptr;
  alignas(64) char in[32 * 64], out[32 * 64];
};

constexpr size_t kStack = 256 << 10;
constexpr int kMostThreads = 1024;

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  std::vector<Warp> warps = std::vector<Warp>(kMostThreads / 32);
  Registers scheduler;
  int threads = 0, current = 0, arrived = 0, generation = 0;
  int64_t block = 0;
  char *shared = nullptr, *stacks = nullptr;
  // For the race check (races.cpp): accesses of two warps in one interval are not ordered.
  const char* kernel = "";
  size_t shared_bytes = 0;
  int64_t launch = 0;
  int interval = 0, barriers = 0, most_barriers = 0, ignored_barrier = 0;
  std::string watched;  // the kernel whose barriers are counted, or ignored
  bool in_fiber = false;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  uint64_t seed = 0;
};

extern Machine machine;

[[noreturn, gnu::noinline]] inline void jump(Registers& registers) { __builtin_longjmp(registers, 1); }

inline void yield(const int* waits_for) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.waits_for = waits_for;
  fiber.seen = *waits_for;
  if (__builtin_setjmp(fiber.registers) == 0) jump(machine.scheduler);
}

// A fiber runs the same thread of all blocks, one after the other, since starting a fiber takes system calls.
inline void enter() {
  for (;;) {
    machine.body(machine.context);
    Fiber& fiber = machine.fibers[machine.current];
    fiber.done = true;
    if (__builtin_setjmp(fiber.registers) == 0) jump(machine.scheduler);
  }
}

inline void start(int thread) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = machine.stacks + thread * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  machine.in_fiber = true;
  setcontext(&context);
}

inline void resume(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  if (__builtin_setjmp(machine.scheduler) == 0) {
    if (!fiber.started) {
      fiber.started = true;
      start(thread);
    }
    machine.in_fiber = true;
    jump(fiber.registers);
  }
  machine.in_fiber = false;
}

inline uint64_t draw() {
  machine.seed ^= machine.seed << 13;
  machine.seed ^= machine.seed >> 7;
  return machine.seed ^= machine.seed << 17;
}

inline void run_block(int64_t block, int threads) {
  machine.block = block;
  machine.threads = threads;
  machine.arrived = machine.barriers = 0;
  ++machine.interval;
  if (!machine.stacks) {
    machine.stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (machine.stacks == MAP_FAILED) fail("no memory for stacks");
  }
  for (int t = 0; t < threads; ++t) {
    machine.fibers[t].done = false;
    machine.fibers[t].waits_for = nullptr;
  }
  for (Warp& warp : machine.warps) warp.arrived = 0;
  const int warps = threads / 32;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; ++w) order[w] = w;
  // With a seed, each warp runs until it blocks, and the order of warps changes between any two barriers.
  auto step = [](int warp, bool& alive) {
    bool moved = false;
    for (int lane = 0; lane < 32; ++lane) {
      Fiber& fiber = machine.fibers[32 * warp + lane];
      if (fiber.done) continue;
      alive = true;
      if (fiber.waits_for && *fiber.waits_for == fiber.seen) continue;
      moved = true;
      resume(32 * warp + lane);
    }
    return moved;
  };
  const bool shuffled = machine.seed != 0;
  for (bool alive = true; alive;) {
    alive = false;
    if (shuffled)
      for (int w = warps - 1; w > 0; --w) std::swap(order[w], order[draw() % (w + 1)]);
    bool moved = false;
    const int generation = machine.generation;
    for (int w : order)
      while (step(w, alive)) {
        moved = true;
        if (!shuffled || machine.generation != generation) break;
      }
    if (alive && !moved) fail("some threads wait for others that have ended");
  }
}

// Executes a warp-wide instruction: `compute` receives the operands of all lanes and fills their results.
template <class Out, class In, class Compute>
Out together(const char* instruction, const In& in, const Compute& compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "");
  Warp& warp = machine.warps[machine.current / 32];
  const int lane = machine.current % 32;
  if (warp.arrived == 0) warp.instruction = instruction;
  if (warp.instruction != instruction) fail("lanes of a warp execute different instructions");
  In* all = reinterpret_cast<In*>(warp.in);
  Out* results = reinterpret_cast<Out*>(warp.out);
  std::memcpy(all + lane, &in, sizeof in);
  if (++warp.arrived == 32) {
    compute(all, results);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    yield(&warp.generation);
  }
  Out out;
  std::memcpy(&out, results + lane, sizeof out);
  return out;
}

inline float low(uint32_t packed) { return as_float(packed << 16); }
inline float high(uint32_t packed) { return as_float(packed & 0xffff0000u); }

// Vectors of one number for each of 8 columns, in the compiler's extension.
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Integers __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(32)));

// c += Σ_k a[k] b[k] over 8 products, truncated.
inline void accumulate(Floats& c, const float* a, const Floats* b) {
  Doubles term[9], most{}, plain{};
  for (int k = 0; k < 8; ++k) term[k] = static_cast<double>(a[k]) * __builtin_convertvector(b[k], Doubles);
  term[8] = __builtin_convertvector(c, Doubles);
  for (const Doubles& x : term) {
    const Doubles size = x < 0.0 ? -x : x;
    most = most < size ? size : most;
    plain += x;
  }
  const Integers exponents = reinterpret_cast<Integers>(most) & int64_t{0x7ff} << 52;
  const Doubles unit = reinterpret_cast<Doubles>(exponents) * 0x1p-23, inverse = 1.0 / unit;
  Integers sum{};
  for (const Doubles& x : term) sum += __builtin_convertvector(x * inverse, Integers);  // towards zero
  // The sum may have more than 24 bits, so truncate it again.
  const Doubles result = __builtin_convertvector(sum, Doubles) * unit;
  const Floats rounded = __builtin_convertvector(result, Floats), whole = __builtin_convertvector(plain, Floats);
  const Doubles beyond = __builtin_convertvector(rounded, Doubles);
  const Integers larger = (beyond < 0.0 ? -beyond : beyond) > (result < 0.0 ? -result : result);  // -1 or 0
  const Words truncated = reinterpret_cast<Words>(rounded) + __builtin_convertvector(larger, Words);
  const Integers ordinary = (most < 1e38) & (most >= 1e-37) & (plain - plain == 0.0);
  c = __builtin_convertvector(ordinary, Words) ? reinterpret_cast<Floats>(truncated) : whole;
}

inline bool is_zero(const float* x) {
  uint64_t words[4];
  std::memcpy(words, x, sizeof words);
  return ((words[0] | words[1] | words[2] | words[3]) & 0x7fffffff7fffffff) == 0;
}

struct Product {
  float c[4];
  uint32_t a[4], b[2];
};
struct Accumulator {
  float c[4];
};

template <int kK, bool kHalf>
void mma(const Product* in, Accumulator* out) {
  auto low = [](uint32_t packed) { return kHalf ? float16_to_float(packed & 0xffffu) : emulation::low(packed); };
  auto high = [](uint32_t packed) { return kHalf ? float16_to_float(packed >> 16) : emulation::high(packed); };
  float a[16][kK];
  Floats b[kK], c[16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < kK / 8; ++k) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * half][8 * k + 2 * t] = low(in[lane].a[2 * k + half]);
        a[g + 8 * half][8 * k + 2 * t + 1] = high(in[lane].a[2 * k + half]);
      }
      b[8 * k + 2 * t][g] = low(in[lane].b[k]);
      b[8 * k + 2 * t + 1][g] = high(in[lane].b[k]);
    }
    for (int e = 0; e < 4; ++e) c[g + 8 * (e / 2)][2 * t + e % 2] = in[lane].c[e];
  }
  // Rows of zeros are frequent, since padding is 0.
  Words unusual{};
  for (const Floats& x : b) unusual |= x - x != 0.0f;
  bool finite = true;
  for (int n = 0; n < 8; ++n) finite &= unusual[n] == 0;
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kK; k += 8)
      if (finite && is_zero(&a[row][k]))
        c[row] += 0.0f;
      else
        accumulate(c[row], &a[row][k], &b[k]);
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) out[lane].c[e] = c[lane / 4 + 8 * (e / 2)][lane % 4 * 2 + e % 2];
}

}  // namespace emulation

constexpr int kCapability = MINILM_EMULATED;  // 90 for compute capability 9.0

inline int thread_index() { return emulation::machine.current; }
inline int thread_count() { return emulation::machine.threads; }
inline int64_t block_index() { return emulation::machine.block; }
inline char* shared_memory() { return emulation::machine.shared; }

inline void hide_value(int&) {}
inline void syncthreads() {
  auto& machine = emulation::machine;
  if (++machine.arrived == machine.threads) {
    machine.arrived = 0;
    ++machine.generation;
    if (machine.watched == machine.kernel) {
      machine.most_barriers = std::max(machine.most_barriers, ++machine.barriers);
      if (machine.barriers == machine.ignored_barrier) return;
    }
    ++machine.interval;
  } else {
    emulation::yield(&machine.generation);
  }
}
inline void syncwarp() {
  emulation::together<int>("syncwarp", 0, [](const int*, int* out) { std::fill(out, out + 32, 0); });
}
template <class T>
T shuffle_xor(T x, int mask) {
  struct In {
    T x;
    int mask;
  };
  return emulation::together<T>("shuffle_xor", In{x, mask}, [](const In* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ in[lane].mask].x;
  });
}

inline float exp2_fast(float x) {
  if (std::isnan(x)) return x;
  uint32_t hash = as_bits(x) * 2654435761u;
  hash ^= hash >> 15;
  const double error = (static_cast<double>(hash % 2001u) - 1000.0) / 1000.0 * 0x1p-22;
  float y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + error));
  return y < 0x1p-126f ? 0.0f : y;
}
inline float add(float x, float y) { return x + y; }
inline float sub(float x, float y) { return x - y; }
inline float mul(float x, float y) { return x * y; }
struct Float2 {
  float x, y;
};
inline Float2 operator+(const Float2& a, const Float2& b) { return {a.x + b.x, a.y + b.y}; }
inline Float2 operator-(const Float2& a, const Float2& b) { return {a.x - b.x, a.y - b.y}; }
inline Float2 operator*(const Float2& a, const Float2& b) { return {a.x * b.x, a.y * b.y}; }
inline Float2 fused(const Float2& a, const Float2& b, const Float2& c) {
  return {std::fmaf(a.x, b.x, c.x), std::fmaf(a.y, b.y, c.y)};
}
inline uint32_t pack_bfloat16(float low, float high) {
  auto round = [](float x) -> uint32_t {
    uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline Float2 unpack_float16(uint32_t packed) {
  return {float16_to_float(packed & 0xffffu), float16_to_float(packed >> 16)};
}
inline uint32_t pack_float16(float low, float high) {
  auto round = [](float x) -> uint32_t {
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
    // Subnormal float16 are multiples of 2^-24; the sum rounds to them.
    if (magnitude < 0x38800000u) return sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
    return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  };
  return round(low) | round(high) << 16;
}

namespace emulation {
struct MatrixRegisters {
  uint32_t r[4];
};
inline MatrixRegisters ldmatrix_x4(const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix is not aligned");
  const char* instruction = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  auto direct = [](const void* const* in, MatrixRegisters* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        std::memcpy(&out[lane].r[m], static_cast<const char*>(in[8 * m + lane / 4]) + lane % 4 * 4, 4);
  };
  auto mirrored = [](const void* const* in, MatrixRegisters* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint16_t x[2];
        for (int e = 0; e < 2; ++e)
          std::memcpy(&x[e], static_cast<const char*>(in[8 * m + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
        out[lane].r[m] = x[0] | static_cast<uint32_t>(x[1]) << 16;
      }
  };
  return transposed ? together<MatrixRegisters>(instruction, row, mirrored)
                    : together<MatrixRegisters>(instruction, row, direct);
}
// The addresses of lanes 0 to 15, for all lanes.
inline const void* first_rows(const void* row) {
  return together<const void*>("ldmatrix_x2", row, [](const void* const* in, const void** out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane % 16];
  });
}
}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  auto out = emulation::ldmatrix_x4(row, false);
  std::copy(out.r, out.r + 4, r);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  auto out = emulation::ldmatrix_x4(row, true);
  std::copy(out.r, out.r + 4, r);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  auto out = emulation::ldmatrix_x4(emulation::first_rows(row), false);
  std::copy(out.r, out.r + 2, r);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  auto out = emulation::ldmatrix_x4(emulation::first_rows(row), true);
  std::copy(out.r, out.r + 2, r);
}
inline uint32_t movmatrix(uint32_t x) {
  return emulation::together<uint32_t>("movmatrix", x, [](const uint32_t* in, uint32_t* out) {
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t pair = 0;
      for (int e = 0; e < 2; ++e) {  // element (lane / 4, 2 (lane % 4) + e) of the transpose
        const int row = lane % 4 * 2 + e, column = lane / 4;
        pair |= (in[4 * row + column / 2] >> 16 * (column % 2) & 0xffffu) << 16 * e;
      }
      out[lane] = pair;
    }
  });
}
template <bool kHalf = false>
void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  auto out = emulation::together<emulation::Accumulator>(
      kHalf ? "mma_m16n8k8 f16" : "mma_m16n8k8", emulation::Product{{c[0], c[1], c[2], c[3]}, {a0, a1, 0, 0}, {b0, 0}},
      [](const emulation::Product* in, emulation::Accumulator* result) { emulation::mma<8, kHalf>(in, result); });
  std::copy(out.c, out.c + 4, c);
}
template <bool kHalf = false>
void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto out = emulation::together<emulation::Accumulator>(
      kHalf ? "mma_m16n8k16 f16" : "mma_m16n8k16",
      emulation::Product{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}},
      [](const emulation::Product* in, emulation::Accumulator* result) { emulation::mma<16, kHalf>(in, result); });
  std::copy(out.c, out.c + 4, c);
}

struct Uint4 {
  uint32_t word[4];
};
inline Uint4 load_uint4(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("16 bytes are not aligned");
  Uint4 x;
  std::memcpy(&x, from, 16);
  return x;
}
inline void store_uint4(void* to, const Uint4& x) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::fail("16 bytes are not aligned");
  std::memcpy(to, &x, 16);
}
// Copies arrive when their thread waits for them. The race check sees the accesses, not the list of copies.
inline void copy_or_clear(void* to, const void* from, bool copy) {
  const Uint4 words = copy ? load_uint4(from) : Uint4{};
  auto& machine = emulation::machine;
  machine.in_fiber = false;
  emulation::Copy pending{to, {}};
  std::memcpy(pending.words, &words, sizeof words);
  machine.fibers[machine.current].copies.push_back(pending);
  machine.in_fiber = true;
}
inline void wait_for_copies() {
  auto& machine = emulation::machine;
  auto& copies = machine.fibers[machine.current].copies;
  for (size_t k = 0; k < copies.size(); ++k) {
    machine.in_fiber = false;
    void* to = copies[k].to;
    Uint4 words;
    std::memcpy(&words, copies[k].words, sizeof words);
    machine.in_fiber = true;
    store_uint4(to, words);
  }
  copies.clear();
}
inline uint32_t load_word(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 4) emulation::fail("4 bytes are not aligned");
  uint32_t x;
  std::memcpy(&x, from, 4);
  return x;
}
inline Float2 load_float2(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 8) emulation::fail("8 bytes are not aligned");
  return {from[0], from[1]};
}
inline void store_float2(float* to, float x, float y) {
  if (reinterpret_cast<uintptr_t>(to) % 8) emulation::fail("8 bytes are not aligned");
  to[0] = x;
  to[1] = y;
}

template <class Parameters>
const char* emulate(void (*kernel)(const Parameters), const std::string& name, const char* given, int64_t blocks,
                    int threads, int64_t shared) {
  Parameters parameters;
  std::memcpy(&parameters, given, sizeof parameters);
  using namespace emulation;
  if (threads % 32 || threads > kMostThreads) fail("the number of threads is too large or not a multiple of 32");
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = (static_cast<size_t>(shared) + page - 1) / page * page;
  char* memory =
      static_cast<char*>(mmap(nullptr, pages + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return "no memory";
  mprotect(memory, page, PROT_NONE);
  mprotect(memory + page + pages, page, PROT_NONE);
  if (shared % 128) fail("shared memory is not a multiple of 128 bytes");
  machine.shared = memory + page + pages - shared;
  machine.shared_bytes = static_cast<size_t>(shared);
  machine.kernel = name.c_str();
  ++machine.launch;
  struct Context {
    void (*kernel)(const Parameters);
    const Parameters* parameters;
  } context{kernel, &parameters};
  machine.context = &context;
  machine.body = [](void* raw) {
    auto* c = static_cast<Context*>(raw);
    c->kernel(*c->parameters);
  };
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(machine.shared, 0xff, static_cast<size_t>(shared));
    run_block(block, threads);
  }
  munmap(memory, pages + 2 * page);
  return nullptr;
}

}  // namespace minilm::cuda
