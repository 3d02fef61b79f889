// Between the driver (relation.cpp) and the kernels (kernels.inl, compiled once per instruction set).
//
// A task is one head of one sequence in one relation. Its real tokens are gathered side by side in float32; a matrix
// of L tokens is stored as blocks of V tokens, V the vector's lanes: x[block][feature][lane]. These take up
// f = sqrt(|scale| log2 e), so that scores are in units of log 2. Gradients want the student's tokens as they came.
#pragma once

#include "relation.h"

namespace minilm::cpu {

constexpr float kMostBits = 100.0f;  // the diagonal's exponentials stay within 2^±kMostBits
constexpr int kStripRows = 8;  // rows that are worked on together
constexpr int64_t kFlushStrips = 16;  // strips whose sums are added up before they join the total

struct Side {
  const Half* half;
  int64_t width;
  float *keys, *queries;           // the same where the relation is a self relation of positive scale
  float *key_rows, *query_rows;    // student, where a gradient is wanted: the same token by token (kernels.inl, Chunk)
  float *key_grads, *query_grads;  // student: `chunks` accumulators each, likewise the same, likewise token by token
  float* recent_grads;             // student: of the keys, `chunks` again, before they join the others
  float* norms;                    // self relations: u_ii, then what the diagonal adds to the gradient
  float *mean, *offsets;           // self relations: of all tokens; what a token adds to its scores (kernels.inl)
};

struct Task {
  const Relation* relation;
  int64_t sequence, head, length, blocks;
  const int64_t* tokens;  // (length,)
  int64_t prefix;         // rows and keys below it see each other both ways; length: a bidirectional mask
  Side teacher, student;
  bool paired;       // products by pairs of features where that may be
  bool symmetric;    // unordered pairs, which needs a shared scale of all rows; otherwise row by row
  bool gradient;     // wanted
  bool exact;        // rows of small KL are wanted to full relative precision
  float weight;      // of all rows in the gradient
  const float* row_grads;  // (positions,) or null: weights of single rows
  float* rows;             // (positions,) or null
  int64_t chunks;          // strips i, i + chunks, ... make a chunk; chunks run beside each other
  float* row_sums;    // symmetric: [3][blocks·V]: Σ E_t, Σ E_s, Σ E_t·(u_s − u_t) of the keys before the row
  float* column_sums; // symmetric: [chunks][2][3][blocks·V]: the same of the keys behind the row
  float* inverse;     // symmetric: [2][blocks·V]: 1 / Σ E_t, 1 / Σ E_s
  float* kept;        // symmetric, of a single chunk: exponentials for the second phase
  int64_t kept_size;  // floats; 0 where there are more chunks
  double* kl;         // [chunks + 1] sums of KL
  int64_t head_stride;  // of gradients, from token to token
  float *query_out, *key_out;  // gradients at position 0 of this sequence and head
};

struct Range {
  float low, high;
};

struct Kernels {
  int64_t lanes;
  int64_t panel_floats;  // scratch of a symmetric panel
  int64_t (*row_floats)(int64_t width);  // of a student's token, token by token
  void (*gather)(const Task* const* tasks, int64_t heads, int64_t block);  // of neighbouring heads
  Range (*range)(const float* x, int64_t count);  // NaN unless all are finite
  void (*center)(const Task&, const Side&);  // tokens become relative to their mean and take up the scale
  void (*shift)(const Task&, const Side&, float reference);
  void (*fold)(const Task&, const Side&);    // tokens take up the scale
  void (*symmetric_sums)(const Task&, int64_t chunk, float* scratch);
  void (*symmetric_rows)(const Task&);
  void (*symmetric_gradient)(const Task&, int64_t chunk, float* scratch);
  void (*strips)(const Task&, int64_t chunk, float* scratch);
  void (*scatter)(const Task&, int64_t block);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

}  // namespace minilm::cpu
