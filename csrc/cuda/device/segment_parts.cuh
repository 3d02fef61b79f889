// A head that exceeds shared memory is divided among several blocks (segments.cuh). This file has the division, the
// scratch memory that holds the parts of its sums and gradients, and the functions that add them up, in the order of
// parts. Blocks of the row-wise kernels call them, because they own disjoint tokens of a head.
#pragma once

#include "strips.cuh"

namespace minilm::cuda {

// A sequence has windows of `window` tokens. Part p of it has the windows first(p) ... first(p + 1) - 1. Part p meets
// itself and the next reach() parts, modulo their number, which is odd: any two parts meet once.
struct Division {
  int windows, parts;

  MINILM_DEVICE Division(const SegmentParams& segments, int length)
      : windows((length + segments.window - 1) / segments.window),
        parts(min_of(segments.parts, windows - 1 + windows % 2)) {}
  MINILM_DEVICE int first(int part) const { return part * windows / parts; }
  MINILM_DEVICE int reach() const { return parts / 2; }
};

// Sums and gradients of a token have 1 + reach() contributions: number k comes from the block of the k-th part before
// the token's. In the gradient, contribution 0 is in the output itself, as yet without its factor.
struct HeadScratch {
  HeadRange* range;
  float* sums;   // [contribution][token][2]
  float* grads;  // [contribution - 1][token][8 * chunks]
  float* words;  // [4][token]: the factors of strips.cuh; of float32 students, [2][token]: 1/l of teacher and student
  int64_t stride;
  int grad_floats;
  int format;  // the student's

  // `part`: that of the block; without one, the first.
  MINILM_DEVICE HeadScratch(const LaunchParams& params, const Relation& relation, int64_t n, const Sequence& sequence,
                            int64_t head, int part = 0)
      : range(params.segments.ranges +
              ((relation.index * params.call.num_sequences + n) * params.call.num_heads + head) *
                  params.segments.parts +
              part),
        stride(params.row_stats_stride),
        grad_floats(params.segments.grad_floats),
        format(format_of(relation.student.key.dtype)) {
    const Call& call = params.call;
    const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
    const int64_t row = (relation.index * call.num_heads + head) * total + sequence.first;
    sums = params.segments.sums + row * 2;
    grads = params.segments.grads + row * grad_floats;
    words = params.row_stats + row;
  }
  MINILM_DEVICE float* sums_of(int contribution, int token) const { return sums + (contribution * stride + token) * 2; }
  MINILM_DEVICE float* grads_of(int contribution, int token) const {
    return grads + ((contribution - 1) * stride + token) * grad_floats;
  }
  MINILM_DEVICE Uint4 factors(int token) const {
    Uint4 factors;
    MINILM_UNROLL_FOR (int k = 0; k < 4; ++k) factors.word[k] = as_bits(words[k * stride + token]);
    return factors;
  }
};

// Replaces the sums of up to thread_count() tokens from `first` on by their factors.
MINILM_DEVICE void finish_sums(const LaunchParams& params, const Sequence& sequence, const HeadScratch& head,
                               int first) {
  const int token = first + thread_index(), reach = Division(params.segments, sequence.length).reach();
  if (token >= sequence.length) return;
  float sum_t = 0.0f, sum_s = 0.0f;
  for (int k = 0; k <= reach; ++k) {
    const Float2 part = load_float2(head.sums_of(k, token));
    sum_t += part.x;
    sum_s += part.y;
  }
  const float scale = grad_scale(head.format);
  const bool counted = counts(sequence, token);
  if (head.format == kFloat32) {
    head.words[token] = counted ? scale / sum_t : 0.0f;  // 0: every probability of the row is 0
    head.words[head.stride + token] = counted ? scale / sum_s : 0.0f;
    return;
  }
  const Uint4 factors = factors_of(sum_t, sum_s, scale, true, token < sequence.prefix, counted);
  MINILM_UNROLL_FOR (int k = 0; k < 4; ++k) head.words[k * head.stride + token] = as_float(factors.word[k]);
}

// Completes the gradient of the same tokens. `out`: gradient of the sequence's first position. Returns the logarithms'
// contribution of the thread's token to the loss.
MINILM_DEVICE float finish_gradient(const LaunchParams& params, const Sequence& sequence, const HeadScratch& head,
                                    int first, float* out, int width, float factor) {
  const int reach = Division(params.segments, sequence.length).reach(), chunks = chunks_of(width);
  const int64_t stride = params.call.num_heads * width;
  for (int item = thread_index(); item < thread_count() * chunks; item += thread_count()) {
    const int token = first + item / chunks, chunk = item % chunks;
    if (token >= sequence.length) continue;
    float* to = out + position_of(sequence, token) * stride;
    alignas(16) float sum[8];
    MINILM_UNROLL_FOR (int d = 0; d < 8; ++d) sum[d] = 8 * chunk + d < width ? to[8 * chunk + d] : 0.0f;
    for (int k = 1; k <= reach; ++k) {
      const float* part = head.grads_of(k, token) + 8 * chunk;
      MINILM_UNROLL_FOR (int d = 0; d < 8; d += 2) {
        const Float2 pair = load_float2(part + d);
        sum[d] += pair.x;
        sum[d + 1] += pair.y;
      }
    }
    write_chunk(to, width, chunk, sum, factor * head.range->grad_factor);
  }
  const int token = first + thread_index();
  if (token >= sequence.length) return 0.0f;
  if (head.format != kFloat32) return log_ratio(head.factors(token));
  const float inverse_t = head.words[token], inverse_s = head.words[head.stride + token];
  return inverse_t != 0.0f ? kLn2 * log2_of_ratio(inverse_t, inverse_s) : 0.0f;
}

}  // namespace minilm::cuda
