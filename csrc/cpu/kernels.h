// Interface between the driver (driver.cpp) and the kernels (kernels.inl, compiled once per instruction set).
//
// A task is one head of one sequence in one relation. Its valid tokens are gathered as float32 into blocks of V tokens,
// where V is the number of lanes of a vector: x[block][feature][lane]. Tokens are multiplied by sqrt(|scale| log2 e),
// so that scores are in units of log 2. The student's gradients use the unscaled tokens.
#pragma once

#include "driver.h"

namespace minilm::cpu {

constexpr float kMostBits = 100.0f;      // exponentials of the diagonal stay within 2^±kMostBits
constexpr int kRowBlock = 8;             // rows that are processed together
constexpr int64_t kFlushRowBlocks = 16;  // row blocks that are summed before they are added to the total

// One model's tokens, gradients and statistics in a task.
struct ModelBuffers {
  const ModelOperands* operands;
  int64_t width, key_head;
  float *keys, *queries;             // the same memory in a self relation with a positive scale
  float *key_tokens, *query_tokens;  // student with gradient: unscaled tokens in the layout of gradients.inl
  float *key_grads, *query_grads;    // student with gradient: one accumulator per slice, in the same layout
  float* recent_grads;               // student with gradient: sums that are not yet part of key_grads (TwoStepSum)
  float* mean;                       // mean of the keys
  float *norms, *offsets;            // if queries are keys: u_ii; the term b_i that token i adds to its scores. The
                                     // symmetric path replaces norms by the score gradient of the diagonal
};

struct Task {
  const Relation* relation;
  int64_t sequence, head, length, blocks;
  const int64_t* tokens;   // (length,)
  const bool* query_mask;  // (positions,): true on rows that count, or null
  int64_t prefix;          // rows and keys below it see each other; equal to `length` for a bidirectional mask
  ModelBuffers teacher, student;
  bool paired;             // multiply features in pairs (scores.inl)
  bool symmetric;          // take the symmetric path, otherwise the row-wise one
  bool gradient;           // compute gradients
  bool exact;              // compute small KL divergences of single rows with full relative precision
  float weight;            // weight of every row in the gradient
  const float* row_grads;  // (positions,): weight of each row in the gradient, or null
  float* row_values;       // (positions,): receives the KL divergence of each row, or null
  int64_t slices;          // row blocks i, i + slices, ... make a slice; slices run in parallel
  float* row_sums;     // symmetric path: [3][blocks·V]: Σ E_t, Σ E_s, Σ E_t (u_s - u_t) over the keys before the row
  float* column_sums;  // symmetric path: [slices][2][3][blocks·V]: the same over the keys after the row
  float* inverse;      // symmetric path: [2][blocks·V]: 1 / Σ E_t, 1 / Σ E_s
  float* exp_cache;    // symmetric path with one slice: exponentials for phase 2
  int64_t exp_cache_size;      // in floats; 0 with more than one slice
  double* kl;                  // [slices + 1]: partial sums of the KL divergence
  int64_t head_stride;         // gradients: elements between two tokens
  float *query_out, *key_out;  // gradients of this sequence and head at position 0
};

struct Kernels {
  int64_t lanes;
  int64_t panel_floats;                                                    // scratch memory of a panel of scores
  int64_t (*token_floats)(int64_t width);                                  // floats of a token in key_tokens
  void (*gather)(const Task* const* tasks, int64_t heads, int64_t block);  // one block of neighbouring heads
  Range (*range)(const float* x, int64_t count);                           // NaN unless all are finite
  void (*center)(const Task&, const ModelBuffers&);                        // subtract the mean, apply the scale
  void (*shift)(const Task&, const ModelBuffers&, float reference);        // change the reference score
  void (*center_keys)(const Task&, const ModelBuffers&);                   // the same if queries are not the keys
  void (*symmetric_sums)(const Task&, int64_t slice, float* scratch);      // phase 1
  void (*symmetric_rows)(const Task&);                                     // between the phases
  void (*symmetric_gradient)(const Task&, int64_t slice, float* scratch);  // phase 2
  void (*row_wise)(const Task&, int64_t slice, float* scratch);
  void (*scatter)(const Task&, int64_t block);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

}  // namespace minilm::cpu
