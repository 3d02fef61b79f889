// The CPU backend as its callers see it: one call with all its relations, as raw pointers. Nothing here knows torch.
//
// Letters as in the package: N sequences, S positions (or T packed tokens), A heads, D_t and D_s head widths.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minilm::cpu {

enum class Type : int32_t { float32, float16, bfloat16 };

// (N, positions, A, D) in any strides, counted in elements. Packed tokens are one sequence of T positions: batch = 0.
struct Matrix {
  const void* data;
  int64_t batch, position, head, feature;
  int64_t width;
  Type type;
};

// One model's part in a relation; of a self relation key == query.
struct Half {
  Matrix query, key;
  float scale;
};

struct Relation {
  Half teacher, student;
  bool self;
  float* query_grad;  // contiguous, of the shape of the student's query; null: no gradient. The other one is written
  float* key_grad;    // only where self is false. Tokens that are not real get zeros.
};

struct Call {
  const Relation* relations;
  int64_t num_relations, num_sequences, num_heads;
  int64_t positions;  // S, or T
  bool packed;
  const int64_t* tokens;    // positions of the real tokens, sequence after sequence, each ascending
  const int64_t* starts;    // (N + 1,): where each sequence's tokens start in `tokens`
  const int64_t* prefixes;  // (N,): tokens of the prefix, counted among the real ones; null: none
  bool causal;              // row i sees j <= i and the prefix; otherwise all
  const float* weights;     // (N,): of a sequence's rows in `values`; null when rows are asked for
  const float* row_grads;   // (R, N, A, S) or (R, A, T): weights of single rows in the gradient; or null
  float* values;            // (R,): weighted sums of KL; or null
  float* rows;              // (R, N, A, S) or (R, A, T): KL of every real row; or null
};

// How to run body(0) ... body(count - 1) on the caller's threads.
struct Threads {
  int64_t count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// Names of the instruction sets that this processor can run, best first, ended by null.
const char* const* instruction_sets();

// Returns null, or what went wrong. `instruction_set`: one of the above.
const char* run(const Call& call, const Threads& threads, const char* instruction_set);

}  // namespace minilm::cpu
