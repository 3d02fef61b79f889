// The inputs and outputs of one call, as raw pointers. The bindings fill in these structs; drivers and kernels read
// them. This header depends on neither PyTorch nor CUDA.
//
// Shapes: N sequences of S positions, or T packed tokens; A relation heads; D features of a head; R relations.
#pragma once

#include "common/numerics.h"

namespace minilm {

enum class DType : int32_t { float32, float16, bfloat16 };

// A tensor (N, S, A, D) or (T, A, D). Strides are counted in elements; packed tensors have batch_stride 0.
struct TensorView {
  const void* data;
  int64_t batch_stride, position_stride, head_stride, feature_stride;
  int32_t width;  // D
  DType dtype;
};

// Queries and keys of one model, and the scale of their scores. In a self relation, key == query. Query head a reads
// key head a / group.
struct ModelOperands {
  TensorView query, key;
  float scale;
  int32_t group;
};

struct Relation {
  ModelOperands teacher, student;
  float* query_grad;  // contiguous float32 in the shape of the student's query, or null
  float* key_grad;    // the same for the key, with the heads of the student's key; in a self relation it equals
                      // query_grad, which receives the sum of both
  int32_t index;      // position among the call's relations
  bool self;
};

// Inputs and outputs that the relations of a call share. The CPU backend gets `tokens`, `starts` and `weights` in every
// call, the CUDA backend only where the call's masks need them.
struct Call {
  int64_t num_relations, num_sequences, num_heads;
  int64_t positions;        // S, or T
  int64_t max_length;       // upper bound on the length of a sequence
  const int64_t* tokens;    // positions of the valid tokens, sequence after sequence, in ascending order; null: all
                            // tokens are valid
  const int64_t* starts;    // (N + 1,): offset of each sequence in `tokens`; null: sequence n begins at n S, and its
                            // padding follows its valid tokens
  const int64_t* lengths;   // (N,): number of valid tokens of each sequence; null: as `starts` tells, or S
  const int64_t* prefixes;  // (N,): number of valid tokens in each prefix, or null
  const bool* query_mask;   // (N, S) or (T,): true on rows that count; null if all valid tokens do
  const float* weights;     // (N,): weight of each sequence's rows in `values` and in the gradient; null: `weight`
  const float* row_grads;   // (R, N, A, S) or (R, A, T): weight of each row in the gradient, or null
  float weight;
  float* values;      // (R,): weighted sums of the KL divergence, or null
  float* row_values;  // (R, N, A, S) or (R, A, T): KL divergence of each row that counts, or null
  bool packed;
  bool causal;    // row i sees key j if j <= i or j is in the prefix; if false without prefixes, it sees every key
  bool padded;    // some tokens may be padding
  bool gradient;  // compute query_grad and key_grad of the relations
};

}  // namespace minilm
