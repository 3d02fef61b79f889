// The CUDA backend as its callers see it: one call with all its relations, as raw device pointers. Nothing here knows
// torch or CUDA.
//
// Letters as in the package: N sequences, S positions (or T packed tokens), A heads, D_t and D_s head widths.
#pragma once

#include "types.h"

namespace minilm::cuda {

enum class Type : int32_t { float32, float16, bfloat16 };

// (N, positions, A, D) in any strides, counted in elements. Packed tokens are one sequence of T positions: batch = 0.
struct Matrix {
  const void* data;
  int64_t batch, position, head, feature;
  int32_t width;
  Type type;
};

// One model's part in a relation; of a self relation key == query.
struct Half {
  Matrix query, key;
  float scale;
};

struct Relation {
  Half teacher, student;
  float* query_grad;  // contiguous float32, of the shape of the student's query; null: no gradient. The other one is
  float* key_grad;    // written only where `self` is false. Tokens that are not real are left alone.
  int32_t index;      // which of the call's relations
  bool self;
};

// What all relations of a call share.
struct Common {
  int64_t num_relations, num_sequences, num_heads;
  int64_t positions;        // S, or T
  int64_t longest;          // no sequence has more tokens: S, or what the caller knows of packed sequences
  const int64_t* tokens;    // positions of the real tokens, sequence after sequence
  const int64_t* starts;    // (N + 1,): where each sequence's tokens start in `tokens`
  const int64_t* prefixes;  // (N,): tokens of the prefix, counted among the real ones; null: none
  const float* weights;     // (N,): of a sequence's rows in `values`; null when rows are asked for
  const float* row_grads;   // (R, N, A, S) or (R, A, T): weights of single rows in the gradient; or null
  float* values;            // (R,): weighted sums of KL; or null
  float* rows;              // (R, N, A, S) or (R, A, T): KL of every real row; or null
  bool packed;
  bool causal;    // row i sees j <= i and the prefix; otherwise all
  bool padded;    // some tokens may not be real
  bool gradient;  // wanted
};

struct Call {
  Common common;
  const Relation* relations;
  void* stream;
};

// What a device offers.
struct Limits {
  int64_t shared_per_block, shared_per_processor;  // bytes
};

}  // namespace minilm::cuda
