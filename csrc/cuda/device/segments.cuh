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
  static constexpr int kPlanesT = kChunksT * splits_in(kFormatT), kPlanesS = kChunksS * splits_in(kFormat);
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
    return reinterpret_cast<float*>(begin + (kPlanesT + kPlanesS + 1) * plane()) + (token - first) * 8;
  }
};

// Smallest and largest s_ii in bits of a head in global memory; see range_of_norms.
MINILM_DEVICE Range range_of_head(const TensorView& x, const Sequence& sequence, int64_t head, int chunks, float scale,
                                  double* scratch) {
  const int64_t base = sequence.batch * x.batch_stride + head * x.head_stride;
  Range range{3e38f, -3e38f};
  for (int i = thread_index(); i < sequence.length; i += thread_count()) {
    float norm = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float value[8];
      load_chunk(x, base + position_of(sequence, i) * x.position_stride, chunk, value);
      MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) norm = fmaf(value[d], value[d], norm);
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
        const HeadScratch scratch(params, *state.relation, state.n, state.sequence, state.head);
        if (params.segments.gradient) {
          const HeadRange range = *scratch.range;
          if (thread_index() == 0) {
            state.reference_t = range.reference_t;
            state.reference_s = range.reference_s;
          }
          if (range.shared) value = meet<true>(params, scratch, memory, part);
        } else if (find_range(scratch, memory, part)) {
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

  // Every block finds the range of its head, whose blocks therefore do not wait for each other.
  static MINILM_DEVICE bool find_range(const HeadScratch& scratch, char* memory, int part) {
    BlockState& state = *reinterpret_cast<BlockState*>(memory);
    double* sums = reinterpret_cast<double*>(memory + kBlockStateBytes);
    const Range range_t =
        range_of_head(state.relation->teacher.key, state.sequence, state.head, kChunksT, state.scale_t, sums);
    const Range range_s =
        range_of_head(state.relation->student.key, state.sequence, state.head, kChunksS, state.scale_s, sums);
    const bool shared = shares_reference(state.sequence.length, range_t, range_s);
    if (thread_index() == 0) {
      state.reference_t = middle_of(range_t);
      state.reference_s = middle_of(range_s);
      if (part == 0) *scratch.range = {state.reference_t, state.reference_s, shared};
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
    char* rows_begin = columns + capacity * (16 * (Columns::kPlanesT + Columns::kPlanesS + 1) + 32 * kChunksS);
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
    load_tokens(state.relation->teacher.key, state.sequence, state.head, window.first, count,
                writable(window.teacher(window.first)), window.plane(), kChunksT, kFormatT);
    load_tokens(state.relation->student.key, state.sequence, state.head, window.first, count,
                writable(window.student(window.first)), window.plane(), kChunksS, kFormat);
    if (kGradient)
      for (int i = window.first + thread_index(); i < window.first + count; i += thread_count())
        store_uint4(window.factors(i), i < state.sequence.length ? scratch.factors(i) : Uint4{});
  }

  // Sets the columns' sums, or their gradients, to zero.
  template <bool kGradient>
  static MINILM_DEVICE void clear(const Columns& window) {
    for (int i = thread_index(); i < window.state().capacity; i += thread_count()) {
      if (!kGradient) store_uint4(window.factors(i), Uint4{});
      for (int chunk = 0; kGradient && chunk < kChunksS; ++chunk)
        for (int half = 0; half < 8; half += 4)
          store_uint4(window.grads(i) + chunk * window.grads_plane() + half, Uint4{});
    }
  }

  // Adds the columns' sums, or their gradients, to contribution `k` in global memory, and sets them to zero.
  template <bool kGradient>
  static MINILM_DEVICE void flush(const LaunchParams& params, const HeadScratch& scratch, const Columns& window, int k,
                                  bool store) {
    const BlockState& state = window.state();
    const int length = state.sequence.length;
    if (!kGradient) {
      for (int i = window.first + thread_index(); i < window.first + state.capacity; i += thread_count()) {
        char* from = window.factors(i);
        if (i < length) {
          const Float2 sums = load_float2(reinterpret_cast<const float*>(from) + 2);
          float* to = scratch.sums_of(k, i);
          const Float2 before = store ? Float2{0.0f, 0.0f} : load_float2(to);
          store_float2(to, before.x + sums.x, before.y + sums.y);
        }
        store_uint4(from, Uint4{});
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
