// Kernels that run before the others if the call has masks. They turn padding masks, query masks and packing into the
// arrays of `Call`, so that neither the host nor PyTorch has to. minilm_kernels/relation/masks.py defines the arrays.
#pragma once

#include "tile.cuh"

namespace minilm::cuda {

// An integer of 1, 2, 4 or 8 bytes. Bytes may be bool.
MINILM_DEVICE int64_t load_integer(const void* data, int64_t at, int bytes) {
  switch (bytes) {
    case 1: return static_cast<const int8_t*>(data)[at];
    case 2: return static_cast<const int16_t*>(data)[at];
    case 4: return static_cast<const int32_t*>(data)[at];
    default: return static_cast<const int64_t*>(data)[at];
  }
}

// True without a mask.
MINILM_DEVICE bool marks(const TokenMask& mask, int64_t n, int64_t position) {
  return !mask.data ||
         load_integer(mask.data, n * mask.batch_stride + position * mask.position_stride, mask.bytes) != 0;
}

// Returns the sum of x over the threads of the block before this one, and in `total` that over all threads. `memory`:
// one number per thread and per warp.
MINILM_DEVICE int sum_before(int x, int* memory, int& total) {
  const int thread = thread_index(), warps = thread_count() / 32;
  int* of_warps = memory + thread_count();
  memory[thread] = x;
  syncthreads();
  int before = 0;
  for (int other = warp_index() * 32; other < thread; ++other) before += memory[other];
  if (lane_index() == 31) of_warps[warp_index()] = before + x;
  syncthreads();
  total = 0;
  for (int warp = 0; warp < warps; ++warp) {
    if (warp < warp_index()) before += of_warps[warp];
    total += of_warps[warp];
  }
  return before;
}

// One block per sequence: lists its valid tokens, and counts them and the rows that count.
struct SequencesKernel {
  static MINILM_DEVICE void run(const SequenceParams& params, char* memory) {
    double* scratch = reinterpret_cast<double*>(memory);
    if (params.packed)
      packed(params, scratch);
    else
      dense(params, scratch, reinterpret_cast<int*>(memory + kScratchBytes));
  }

  // The bounds may be malformed. They are only checked by WeightsKernel, so that counts are arbitrary then.
  static MINILM_DEVICE void packed(const SequenceParams& params, double* scratch) {
    const int64_t n = block_index(), tokens = params.positions;
    if (params.prefixes && thread_index() == 0)
      params.prefixes[n] =
          load_integer(params.prefix_lens.data, n * params.prefix_lens.batch_stride, params.prefix_lens.bytes);
    if (!params.counted) return;
    const int64_t stride = params.num_sequences * thread_count();
    for (int64_t i = n * thread_count() + thread_index(); i < tokens; i += stride)
      params.counted[i] = marks(params.query_mask, 0, i);
    int64_t first = params.cu_seqlens[n], end = params.cu_seqlens[n + 1], rows = 0;
    first = first < 0 ? 0 : first;
    end = end < tokens ? end : tokens;
    for (int64_t i = first + thread_index(); i < end; i += thread_count()) rows += marks(params.query_mask, 0, i);
    const double all_rows = block_sum(static_cast<double>(rows), scratch);
    if (thread_index() == 0) params.row_counts[n] = static_cast<int64_t>(all_rows);
  }

  // A thread takes a run of positions, so that the list is in order.
  static MINILM_DEVICE void dense(const SequenceParams& params, double* scratch, int* memory) {
    const int64_t n = block_index();
    const int positions = static_cast<int>(params.positions);
    const int run = (positions + thread_count() - 1) / thread_count();
    const int first = min_of(thread_index() * run, positions), end = min_of(first + run, positions);
    const int64_t prefix_len =
        params.prefixes
            ? load_integer(params.prefix_lens.data, n * params.prefix_lens.batch_stride, params.prefix_lens.bytes)
            : 0;
    int valid = 0, rows = 0, prefix = 0;
    for (int i = first; i < end; ++i) {
      const bool real = marks(params.attention_mask, n, i), counts = real && marks(params.query_mask, n, i);
      if (params.counted) params.counted[n * positions + i] = counts;
      valid += real;
      rows += counts;
      prefix += real && i < prefix_len;
    }
    int length, next = sum_before(valid, memory, length);
    if (params.tokens) {
      int64_t* tokens = params.tokens + n * positions;
      for (int i = first; i < end; ++i) {
        if (marks(params.attention_mask, n, i))
          tokens[next++] = i;
        else
          tokens[length + i - next] = i;  // i - next: padding before i
      }
    }
    const double all_rows = block_sum(static_cast<double>(rows), scratch);
    const double all_prefix = block_sum(static_cast<double>(prefix), scratch);
    if (thread_index() == 0) {
      if (params.lengths) params.lengths[n] = length;
      if (params.row_counts) params.row_counts[n] = static_cast<int64_t>(all_rows);
      if (params.prefixes) params.prefixes[n] = static_cast<int64_t>(all_prefix);
    }
  }
};

// One block: checks the bounds of packed sequences and computes the weights of their rows in the loss.
//
// If cu_seqlens is malformed, every weight is NaN, and the bounds are replaced by those of N sequences of about T / N
// tokens, so that every result is NaN and no access is out of bounds.
struct WeightsKernel {
  static MINILM_DEVICE void run(const SequenceParams& params, char* memory) {
    double* scratch = reinterpret_cast<double*>(memory);
    const int64_t sequences = params.num_sequences, tokens = params.positions;
    const int32_t* bounds = params.cu_seqlens;
    double faults = 0.0, nonempty = 0.0, rows = 0.0;
    if (params.packed && thread_index() == 0) faults += bounds[0] != 0 || bounds[sequences] != tokens;
    for (int64_t n = thread_index(); n < sequences; n += thread_count()) {
      if (params.packed) {
        const int64_t length = int64_t{bounds[n + 1]} - bounds[n];
        faults += length < 0 || (params.max_seqlen >= 0 && length > params.max_seqlen);
      }
      const int64_t count = row_count(params, n);
      nonempty += count > 0;
      rows += static_cast<double>(count);
    }
    const bool malformed = block_sum(faults, scratch) > 0.0;
    nonempty = block_sum(nonempty, scratch);
    rows = block_sum(rows, scratch);
    if (params.packed)
      for (int64_t n = thread_index(); n <= sequences; n += thread_count())
        params.starts[n] = malformed ? n * tokens / sequences : bounds[n];
    const float heads = static_cast<float>(params.num_heads);
    for (int64_t n = thread_index(); n < sequences; n += thread_count()) {
      const float count = static_cast<float>(row_count(params, n));
      float weight = 1.0f;
      if (params.reduction == Reduction::token) weight = 1.0f / (heads * at_least_one(static_cast<float>(rows)));
      if (params.reduction == Reduction::sequence)
        weight = 1.0f / (heads * at_least_one(static_cast<float>(nonempty)) * at_least_one(count));
      params.weights[n] = malformed ? as_float(0x7fc00000u) : weight;
    }
  }

  static MINILM_DEVICE float at_least_one(float x) { return x > 1.0f ? x : 1.0f; }

  static MINILM_DEVICE int64_t row_count(const SequenceParams& params, int64_t n) {
    if (params.row_counts) return params.row_counts[n];
    if (params.packed) return int64_t{params.cu_seqlens[n + 1]} - params.cu_seqlens[n];
    return params.lengths ? params.lengths[n] : params.positions;
  }
};

}  // namespace minilm::cuda
