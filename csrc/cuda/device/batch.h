// What a launch hands to its blocks, by value: the relations that it serves and how shared memory is cut.
#pragma once

#include "relation.h"

namespace minilm::cuda {

constexpr int kTile = 32;          // tokens of a tile: one warp works on 32 × 32 pairs at a time
constexpr int kMostRelations = 16;  // of a launch: parameters have 4 KiB

// Warps that share a processor's 65 536 registers, by the student's pieces: fused kernels are compiled for blocks of so
// many. docs/cuda.md has what they use.
constexpr int kFusedWarps[] = {0, 12, 12, 8};
constexpr int kRowsWarps = 4;  // of a block, of two on a processor

// Of the shared memory of a fused block.
constexpr int kHeaderBytes = 128, kScratchBytes = 128;

struct Batch {
  Common common;
  Relation relations[kMostRelations];
  int32_t num_relations;
  int32_t capacity;          // fused: tokens that shared memory holds; rows: those of the other side
  int64_t shortest;          // only sequences of shortest … longest tokens are worked on
  int64_t longest;
  double* partials;          // [R][slots]: weighted sums of KL of single blocks
  int64_t slots, first_slot;
  float* statistics;         // rows: [4][R][A][positions of all sequences], as RowStatistics
  int64_t statistics_stride;
  int32_t keys;              // rows: 1 where the own tokens are the keys of a cross relation
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters");

// Values of all relations out of the blocks' partial sums.
struct Reduction {
  Common common;
  const double* partials;
  int64_t slots, fused_slots;
  int32_t num_relations;
  int32_t index[kMostRelations];
  bool fused[kMostRelations], rows[kMostRelations];
};

}  // namespace minilm::cuda
