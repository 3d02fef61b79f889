// Parameters of the kernels, passed by value, and constants that host and device share.
#pragma once

#include "common/relation.h"

namespace minilm::cuda {

constexpr int kTile = 32;          // tokens of a tile: a warp processes 32 × 32 pairs at a time
constexpr int kMaxRelations = 16;  // relations of a launch, limited by the 4 KiB of kernel parameters

// Formats of tokens on tensor cores: the sum of 1, 2 or 3 bfloat16 numbers, its splits. The symmetric path takes
// float16 numbers as they are. Float32 tokens, if both orders of a self relation's pairs are computed, are three splits
// of their difference from the mean, and one plane of offsets (tile.cuh). The gradient of the symmetric path multiplies
// the tokens themselves, as the sum of two float16 numbers.
constexpr int kFloat16 = 4, kFloat32 = 5;
constexpr int splits_in(int format) { return format == kFloat16 ? 1 : format == kFloat32 ? 3 : format; }
constexpr int score_planes(int format, int chunks) { return splits_in(format) * chunks + (format == kFloat32); }

// Format of splits in the row-wise path. `both`: both orders of a self relation's pairs are computed.
constexpr int row_wise_format(int splits, bool both) { return both && splits == 3 ? kFloat32 : splits; }

// The same for score gradients M and the tokens that they are multiplied with.
constexpr int grad_splits_in(int format) { return format == kFloat32 ? 2 : splits_in(format); }
constexpr int student_planes(int format, int chunks) {
  return score_planes(format, chunks) + (format == kFloat32 ? 2 * chunks : 0);
}

// The symmetric path multiplies score gradients, which are at most 2, by this number before it rounds them to float16.
// Those above 4e-9 then have all bits.
constexpr float grad_scale(int format) { return format >= kFloat16 ? 16384.0f : 1.0f; }

// float32 numbers of an instruction: compute capability 10.x has additions, products and fused ones of two.
constexpr int numbers_at_once(int capability) { return capability / 10 == 10 ? 2 : 1; }

// The schedule of a symmetric kernel, chosen so that no loop over pairs spills registers.
struct SymmetricSchedule {
  int strip_rows;  // rows of a strip (strips.cuh); 0: the kernel combines tiles
  int warps;       // most warps per block. They share the 65 536 registers of an SM
};

// Per 16 rows, a strip needs two registers per chunk for operands, and four per chunk of the student for gradients.
constexpr SymmetricSchedule symmetric_schedule(int format_s, int chunks_t, int format_t, int chunks_s, int capability) {
  const int registers = 2 * chunks_t + 6 * chunks_s;
  const bool single = format_s == kFloat32 || format_t == kFloat32;
  if (chunks_t == 0 || registers > (single ? 20 : 40)) return {0, format_s == kFloat32 ? 8 : 12};
  if (single) return {registers <= 10 ? 64 : 32, 8};
  if (registers <= 10 && numbers_at_once(capability) == 2) return {64, 16};
  // With float16 tokens, a loop of causal pairs spills at 16 warps on sm_90.
  if (registers <= 10) return {64, capability < 100 && format_s == 1 && format_t == 1 ? 16 : 12};
  if (registers <= 20) return {32, 12};
  return {32, 8};
}

// Strips compute a quarter of their exponentials by polynomials where exponentials bind by far. Compute capability 10.3
// has twice as many per clock.
constexpr bool has_polynomials(int format_s, int chunks_t, int format_t, int chunks_s, int capability) {
  return capability == 100 && format_s != kFloat32 && format_t != kFloat32 &&
         symmetric_schedule(format_s, chunks_t, format_t, chunks_s, capability).strip_rows == 64;
}

// Warps of a block that combines windows of a longer head: two blocks on an SM, so that one loads while one computes.
constexpr int segment_warps(const SymmetricSchedule& schedule) { return schedule.warps / 2; }

constexpr int kRowWiseWarps = 4;  // warps per block; two blocks run on an SM

// Parts of the shared memory of a symmetric block.
constexpr int kBlockStateBytes = 128, kScratchBytes = 128;

// Numbers that all blocks of a head share. If `shared` is 0, no reference score serves all its rows, and it takes the
// row-wise path.
constexpr int kMaxMeans = 64;  // features of both models; strips of float32 tokens have at most 8 chunks
struct HeadRange {
  float reference_t, reference_s;
  int32_t shared;
  float token_factor, grad_factor;  // powers of two: of the student's tokens, and of the gradients that are stored
  float means[kMaxMeans];           // float32 features of the teacher, then of the student
};

// Heads that exceed shared memory (segments.cuh). Row-wise launches of such heads have these parameters as well.
struct SegmentParams {
  int32_t window;       // tokens of a window; 0: the launch has no such heads
  int32_t parts;        // most parts of a head, an odd number
  int32_t gradient;     // phase: 0, sums; 1, gradients
  int32_t grad_floats;  // floats of a token in `grads`
  HeadRange* ranges;    // [R][N][A][parts]: each block has its own
  float *sums, *grads;  // [1 + parts / 2] and [parts / 2] of [R][A][positions of all sequences][floats of a token]
};

struct LaunchParams {
  Call call;
  Relation relations[kMaxRelations];
  int32_t num_relations;
  int32_t capacity;    // tokens in shared memory; symmetric: those of the sequence; row-wise: those of a streamed tile
  int64_t min_length;  // sequences outside min_length ... max_length are skipped
  int64_t max_length;
  double* partials;  // [R][slots]: weighted KL divergence of each block, from first_slot on
  int64_t slots, first_slot;
  float* row_stats;  // row-wise: [4][R][A][positions of all sequences], the arrays of RowStats
  int64_t row_stats_stride;
  SegmentParams segments;
  int32_t keys;  // row-wise: 1 if a block's own tokens are the keys of a cross relation
};
static_assert(sizeof(LaunchParams) <= 4096, "kernel parameters");

// Parameters of the kernel that adds up the partial sums of all blocks.
struct ReduceParams {
  Call call;
  bool weighted;     // call.values receives the sum of the relations, times `weight`, in place of each
  bool accumulates;  // adds to the sum of an earlier launch
  float weight[kMaxRelations];
  const double* partials;
  int64_t slots;
  int64_t first[kMaxRelations], end[kMaxRelations];  // slots that have been written
  int32_t num_relations;
  int32_t index[kMaxRelations];
};

// A mask of tokens (N, S) or (T,): integers, or bool, in `bytes` bytes each. `data` is null if the call has no such
// mask. The stride of packed masks is position_stride, that of one number per sequence batch_stride.
struct TokenMask {
  const void* data;
  int64_t batch_stride, position_stride;
  int32_t bytes;
};

enum class Reduction : int32_t { sum, token, sequence };

// Masks as the caller has passed them.
struct Masks {
  TokenMask attention_mask, query_mask, prefix_lens;
  const int32_t* cu_seqlens;  // (N + 1,); null in dense calls
  int64_t max_seqlen;         // -1: any length
  Reduction reduction;
};

// Parameters of the kernels that turn masks into the arrays of `Call`; arrays that a call does not need are null.
struct SequenceParams : Masks {
  int64_t num_sequences, num_heads, positions;
  int64_t *tokens, *starts, *lengths, *prefixes, *row_counts;
  bool* counted;
  float* weights;
  bool packed;
};

constexpr int kMaxScaledOutputs = 16, kMaxScaledParts = 48;  // tensors of a launch

// A stored gradient in float32. Its factor is upstream[relation · upstream_stride] · weight.
struct ScaledPart {
  const float* data;
  float weight;
  int32_t relation;
};

// The gradient of a tensor: the sum of its parts.
struct ScaledOutput {
  void* data;
  int64_t numel, first_block;
  DType dtype;
  int32_t first_part, num_parts;
};

struct ScaleParams {
  const float* upstream;
  int64_t upstream_stride;
  int32_t num_outputs;
  ScaledOutput outputs[kMaxScaledOutputs];
  ScaledPart parts[kMaxScaledParts];
};

}  // namespace minilm::cuda
