// The kernel of the backward: multiplies the stored gradients by the upstream gradient, adds up those of one tensor and
// rounds them to the tensor's dtype. One launch computes all gradients of a call.
#pragma once

#include "tile.cuh"

namespace minilm::cuda {

struct ScaleKernel {
  static constexpr int kItems = 8;  // elements of a thread

  static MINILM_DEVICE void run(const ScaleParams& params, char*) {
    int o = 0;
    while (o + 1 < params.num_outputs && params.outputs[o + 1].first_block <= block_index()) ++o;
    const ScaledOutput& output = params.outputs[o];
    const int64_t first = ((block_index() - output.first_block) * thread_count() + thread_index()) * kItems;
    if (first >= output.numel) return;
    const int count = static_cast<int>(output.numel - first < kItems ? output.numel - first : kItems);
    float sum[kItems];
    for (int k = 0; k < output.num_parts; ++k) {
      const ScaledPart& part = params.parts[output.first_part + k];
      const float factor = mul(params.upstream[part.relation * params.upstream_stride], part.weight);
      float x[kItems];
      load(x, part.data + first, count);
      MINILM_UNROLL_FOR (int i = 0; i < kItems; ++i)
        sum[i] = k == 0 ? mul(x[i], factor) : add(sum[i], mul(x[i], factor));
    }
    store(output, first, count, sum);
  }

  static MINILM_DEVICE bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

  static MINILM_DEVICE void load(float (&x)[kItems], const float* from, int count) {
    if (count == kItems && is_aligned(from)) {
      MINILM_UNROLL_FOR (int i = 0; i < kItems; i += 4) {
        Uint4 words = load_uint4(from + i);
        MINILM_UNROLL_FOR (int k = 0; k < 4; ++k) x[i + k] = as_float(words.word[k]);
      }
    } else {
      MINILM_UNROLL_FOR (int i = 0; i < kItems; ++i) x[i] = i < count ? from[i] : 0.0f;
    }
  }

  static MINILM_DEVICE void store(const ScaledOutput& output, int64_t first, int count, const float (&x)[kItems]) {
    if (output.dtype == DType::float32) {
      float* to = static_cast<float*>(output.data) + first;
      if (count == kItems && is_aligned(to)) {
        MINILM_UNROLL_FOR (int i = 0; i < kItems; i += 4)
          store_uint4(to + i, {{as_bits(x[i]), as_bits(x[i + 1]), as_bits(x[i + 2]), as_bits(x[i + 3])}});
      } else {
        MINILM_UNROLL_FOR (int i = 0; i < kItems; ++i)
          if (i < count) to[i] = x[i];
      }
      return;
    }
    uint16_t* to = static_cast<uint16_t*>(output.data) + first;
    Uint4 words;
    MINILM_UNROLL_FOR (int i = 0; i < 4; ++i)
      words.word[i] = output.dtype == DType::bfloat16 ? pack_bfloat16(x[2 * i], x[2 * i + 1])
                                                      : pack_float16(x[2 * i], x[2 * i + 1]);
    if (count == kItems && is_aligned(to)) {
      store_uint4(to, words);
    } else {
      MINILM_UNROLL_FOR (int i = 0; i < kItems; ++i)
        if (i < count) to[i] = static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)));
    }
  }
};

}  // namespace minilm::cuda
