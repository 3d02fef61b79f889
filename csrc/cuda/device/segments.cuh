// The symmetric path for heads that exceed shared memory. A head is divided into windows of as many strips (strips.cuh)
// as a block has warps. A block owns the windows of one part of the head: it keeps a window's rows in registers, while
// the columns of this and of later windows pass through shared memory, one window at a time. Two launches compute the
// two phases; between and after them, blocks of the row-wise kernels add up the contributions of the parts
// (segment_parts.cuh), or compute the heads whose range of s_ii is too wide. docs/cuda.md has the cost.
#pragma once

#include "segment_parts.cuh"
#include "symmetric.cuh"

namespace minilm::cuda {

// Tokens of a window in shared memory, with the interface that strips expect: positions are those in the sequence.
// segment_bytes in launch_plan.h computes the size of a block's two windows. The gradients are those of columns.
template <int kFormat, int kChunksT, int kFormatT, int kChunksS>
struct Window {
  static constexpr int kTeacherFormat = kFormatT, kStudentFormat = kFormat;
  static constexpr int kPlanesT = score_planes(kFormatT, kChunksT), kPlanesS = student_planes(kFormat, kChunksS);
  static constexpr int kFactorPlanes = kFormat == kFloat32 ? 2 : 1;
  static constexpr int kPlanes = kPlanesT + kPlanesS + kFactorPlanes;
  char* memory;  // the block's
  char* begin;   // the window's
  int first;     // position of its first token

  MINILM_DEVICE BlockState& state() const { return *reinterpret_cast<BlockState*>(memory); }
  MINILM_DEVICE int plane() const { return state().capacity * 16; }
  MINILM_DEVICE int grads_plane() const { return state().capacity * 8; }
  MINILM_DEVICE Tokens teacher(int token) const { return {begin + (token - first) * 16, plane()}; }
  MINILM_DEVICE Tokens student(int token) const { return {begin + kPlanesT * plane() + (token - first) * 16, plane()}; }
  MINILM_DEVICE char* factors(int token) const {
    return begin + (kPlanesT + kPlanesS) * plane() + (token - first) * 16;
  }
  MINILM_DEVICE float* grads(int token) const {  // [chunk][token][8]
    return reinterpret_cast<float*>(begin + kPlanes * plane()) + (token - first) * 8;
  }
};

// Smallest and largest s_ii in bits, less |μ|² if the tokens have means; see range_of_norms.
MINILM_DEVICE Range range_of_head(const HeadTokens& load, int chunks, float scale, const float* means,
                                  double* scratch) {
  Range range{3e38f, -3e38f};
  for (int i = thread_index(); i < load.sequence.length; i += thread_count()) {
    float norm = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float value[8];
      load(i, chunk, value);
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) {
        const float mean = means ? means[8 * chunk + d] : 0.0f, x = sub(value[d], mean);
        norm = fmaf(x, fmaf(2.0f, mean, x), norm);
      }
    }
    widen(range, norm * scale);
  }
  return block_range(range, scratch);
}

// Adds the first `count` of 8 numbers to `to`, or stores them.
MINILM_DEVICE void accumulate(float* to, const float* from, int count, bool store) {
  if (count % 4 == 0) {
    MINILM_UNROLL_FOR (int d = 0; d < 8; d += 4)
      if (d < count) {
        Uint4 sum = load_uint4(from + d);
        if (!store) {
          const Uint4 before = load_uint4(to + d);
          MINILM_UNROLL_FOR (int k = 0; k < 4; ++k)
            sum.word[k] = as_bits(as_float(before.word[k]) + as_float(sum.word[k]));
        }
        store_uint4(to + d, sum);
      }
  } else {
    MINILM_UNROLL_FOR (int d = 0; d < 8; ++d)
      if (d < count) to[d] = store ? from[d] : to[d] + from[d];
  }
}

template <int kFormat, int kChunksT, int kFormatT, int kChunksS, bool kCausal>
struct SegmentKernel {
  static constexpr SymmetricSchedule kSchedule = symmetric_schedule(kFormat, kChunksT, kFormatT, kChunksS, kCapability);
  static constexpr int kWarps = segment_warps(kSchedule);
  static constexpr int kRows = kSchedule.strip_rows;
  static constexpr bool kMeansT = kFormatT == kFloat32, kMeansS = kFormat == kFloat32;
  static_assert(kRows == 0 || !(kMeansT || kMeansS) || 8 * (kChunksT + kChunksS) <= kMaxMeans, "means of a head");
  using Columns = Window<kFormat, kChunksT, kFormatT, kChunksS>;
  using Schedule = Strips<Columns, kRows / 16, kChunksT, kChunksS, kCausal>;

  static MINILM_DEVICE void run(const LaunchParams& params, char* memory) {
    if constexpr (kRows > 0) {
      BlockState& state = *reinterpret_cast<BlockState*>(memory);
      const int64_t heads = params.call.num_heads, parts = params.segments.parts;
      const int64_t block = block_index() / heads;
      const int part = static_cast<int>(block % parts);
      if (thread_index() == 0) find_head(params, block / parts * heads + block_index() % heads, state);
      syncthreads();
      double value = 0.0;
      if (state.sequence.length > 0 && part < Division(params.segments, state.sequence.length).parts) {
        const HeadScratch scratch(params, *state.relation, state.n, state.sequence, state.head, part);
        if (params.segments.gradient) {
          const HeadRange& range = *scratch.range;
          if (thread_index() == 0) {
            state.reference_t = range.reference_t;
            state.reference_s = range.reference_s;
          }
          if (range.shared) value = meet<true>(params, scratch, memory, part);
        } else if (find_range(*scratch.range, memory)) {
          meet<false>(params, scratch, memory, part);
        }
      }
      if (!params.segments.gradient) return;
      value = block_sum(value, reinterpret_cast<double*>(memory + kBlockStateBytes));
      if (thread_index() == 0)
        params.partials[state.relation->index * params.slots + params.first_slot +
                        ((state.n * parts + part) * params.call.num_heads + state.head)] =
            weight_of(params.call, state.n) * value;
    }
  }

  // Every block finds the range and the means of its head, whose blocks therefore do not wait for each other.
  static MINILM_DEVICE bool find_range(HeadRange& head, char* memory) {
    BlockState& state = *reinterpret_cast<BlockState*>(memory);
    double* sums = reinterpret_cast<double*>(memory + kBlockStateBytes);
    const HeadTokens teacher(state.relation->teacher.key, state.sequence, state.head);
    const HeadTokens student(state.relation->student.key, state.sequence, state.head);
    float *means_t = head.means, *means_s = means_t + 8 * kChunksT;
    float* windows = reinterpret_cast<float*>(memory + kBlockStateBytes + kScratchBytes);
    if (kMeansT) find_means(teacher, kChunksT, means_t, windows);
    float token_factor = 1.0f, grad_factor = 1.0f / grad_scale(kFormat);
    if (kMeansS) {
      const float most = find_means(student, kChunksS, means_s, windows);
      const uint32_t exponent = exponent_of(block_range({0.0f, most}, sums).high);
      token_factor = cuda::token_factor(exponent);
      grad_factor *= cuda::grad_factor(exponent);
    }
    const Range range_t = range_of_head(teacher, kChunksT, state.scale_t, kMeansT ? means_t : nullptr, sums);
    const Range range_s = range_of_head(student, kChunksS, state.scale_s, kMeansS ? means_s : nullptr, sums);
    const bool shared = shares_reference(state.sequence.length, range_t, range_s);
    if (thread_index() == 0) {
      head.reference_t = state.reference_t = middle_of(range_t);
      head.reference_s = state.reference_s = middle_of(range_s);
      head.shared = shared;
      head.token_factor = token_factor;
      head.grad_factor = grad_factor;
    }
    return shared;
  }

  // One phase of a part. Returns the contribution to the loss, in parts per thread.
  template <bool kGradient>
  static MINILM_DEVICE double meet(const LaunchParams& params, const HeadScratch& scratch, char* memory, int part) {
    const BlockState& state = *reinterpret_cast<const BlockState*>(memory);
    const int warp = warp_index(), warps = thread_count() / 32, capacity = state.capacity;
    const int strips = (state.sequence.length + kRows - 1) / kRows;
    const Division division(params.segments, state.sequence.length);
    char* columns = memory + kBlockStateBytes + kScratchBytes;
    char* rows_begin = columns + capacity * (16 * Columns::kPlanes + 32 * kChunksS);
    CompensatedSum value;
    clear<kGradient>(Columns{memory, columns, 0});
    for (int own = division.first(part); own < division.first(part + 1); ++own) {
      const Columns own_tokens{memory, rows_begin, own * capacity};
      load<kGradient>(scratch, own_tokens);
      syncthreads();
      const int strip = own * warps + warp;
      typename Schedule::Rows rows;
      typename Schedule::Sums sums = {};
      typename Schedule::Grads grads = {};
      if (strip < strips) rows.load(own_tokens, strip * kRows);
      for (int k = 0; k <= division.reach(); ++k) {
        const int met = (part + k) % division.parts;
        for (int other = k == 0 ? own : division.first(met); other < division.first(met + 1); ++other) {
          const Columns tokens{memory, columns, other * capacity};
          load<kGradient>(scratch, tokens);
          syncthreads();
          // Off the diagonal, strip i meets strip i + round of the other window: no two strips share columns.
          const int own_strips = min_of(warps, strips - own * warps);
          const int rounds = other == own ? own_strips / 2 + 1 : warps;
          for (int round = 0; round < rounds; ++round) {
            const int partner = other == own ? partner_of(own_strips, warp, round) : (warp + round) % warps;
            const int column = other * warps + partner;
            if (strip < strips && partner >= 0 && column < strips) {
              if constexpr (kGradient)
                value += Schedule::add_gradients(own_tokens, tokens, rows, grads, strip, column);
              else
                Schedule::add_sums(tokens, rows, sums, strip, column);
            }
            syncthreads();
          }
          flush<kGradient>(params, scratch, tokens, k, own == division.first(part));
          syncthreads();
        }
      }
      // The rows' own results pass through the memory of the columns' results.
      const Columns own_results{memory, columns, own * capacity};
      if (strip < strips) {
        if constexpr (kGradient)
          Schedule::write_gradients(own_results, grads, strip);
        else
          Schedule::write_sums(own_results, sums, strip);
      }
      syncthreads();
      flush<kGradient>(params, scratch, own_results, 0, false);
      syncthreads();
    }
    return static_cast<double>(value.sum) + value.rest;
  }

  template <bool kGradient>
  static MINILM_DEVICE void load(const HeadScratch& scratch, const Columns& window) {
    const BlockState& state = window.state();
    const int count = min_of(state.capacity, static_cast<int>(round_up(state.sequence.length - window.first, kRows)));
    const HeadRange& head = *scratch.range;
    load_model<kChunksT, kFormatT>(window, state.relation->teacher.key, window.teacher(window.first), count, head.means,
                                   0.0f);
    load_model<kChunksS, kFormat>(window, state.relation->student.key, window.student(window.first), count,
                                  head.means + 8 * kChunksT, kGradient ? head.token_factor : 0.0f);
    if (!kGradient) return;
    for (int i = window.first + thread_index(); i < window.first + count; i += thread_count()) {
      const bool exists = i < state.sequence.length;
      if constexpr (Schedule::kThree)
        MINILM_UNROLL_FOR (int model = 0; model < 2; ++model)
          store_uint4(window.factors(i) + model * window.plane(),
                      factors_of(exists ? scratch.words[model * scratch.stride + i] : 0.0f, exists, i < state.bound));
      else
        store_uint4(window.factors(i), exists ? scratch.factors(i) : Uint4{});
    }
  }

  template <int kChunks, int kTokens>
  static MINILM_DEVICE void load_model(const Columns& window, const TensorView& x, const Tokens& to, int count,
                                       const float* means, float factor) {
    const BlockState& state = window.state();
    if constexpr (kTokens == kFloat32) {
      subtract_means(to, HeadTokens(x, state.sequence, state.head), window.first, count, kChunks, means, factor);
    } else {
      load_tokens(x, state.sequence, state.head, window.first, count, to, kChunks, kTokens);
    }
  }

  // Sets the columns' sums, or their gradients, to zero.
  template <bool kGradient>
  static MINILM_DEVICE void clear(const Columns& window) {
    for (int i = thread_index(); i < window.state().capacity; i += thread_count()) {
      if (!kGradient) clear_sums(window, i);
      for (int chunk = 0; kGradient && chunk < kChunksS; ++chunk)
        for (int half = 0; half < 8; half += 4)
          store_uint4(window.grads(i) + chunk * window.grads_plane() + half, Uint4{});
    }
  }

  static MINILM_DEVICE void clear_sums(const Columns& window, int i) {
    MINILM_UNROLL_FOR (int k = 0; k < Columns::kFactorPlanes; ++k)
      store_uint4(window.factors(i) + k * window.plane(), Uint4{});
  }

  // Adds the columns' sums, or their gradients, to contribution `k` in global memory, and sets them to zero.
  template <bool kGradient>
  static MINILM_DEVICE void flush(const LaunchParams& params, const HeadScratch& scratch, const Columns& window, int k,
                                  bool store) {
    const BlockState& state = window.state();
    const int length = state.sequence.length;
    if (!kGradient) {
      for (int i = window.first + thread_index(); i < window.first + state.capacity; i += thread_count()) {
        if (i < length) {
          float* to = scratch.sums_of(k, i);
          const Float2 before = store ? Float2{0.0f, 0.0f} : load_float2(to);
          store_float2(to, before.x + *Schedule::sum_of(window, i, 0), before.y + *Schedule::sum_of(window, i, 1));
        }
        clear_sums(window, i);
      }
      return;
    }
    const int width = state.relation->student.key.width;
    const int64_t heads = params.call.num_heads;
    float* out =
        state.relation->query_grad + (state.sequence.batch * params.call.positions * heads + state.head) * width;
    for (int item = thread_index(); item < state.capacity * kChunksS; item += thread_count()) {
      const int i = window.first + item / kChunksS, chunk = item % kChunksS;
      float* from = window.grads(i) + chunk * window.grads_plane();
      if (i < length) {
        float* to = k == 0 ? out + position_of(state.sequence, i) * heads * width : scratch.grads_of(k, i);
        accumulate(to + 8 * chunk, from, k == 0 ? min_of(8, width - 8 * chunk) : 8, store);
      }
      store_uint4(from, Uint4{});
      store_uint4(from + 4, Uint4{});
    }
  }
};

}  // namespace minilm::cuda
