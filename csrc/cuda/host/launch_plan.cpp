// See plan.h. The layouts are those of Fused (fused.cuh) and Rows (rows.cuh).

#include "plan.h"

#include <algorithm>
#include <initializer_list>

namespace minilm::cuda {
namespace {

constexpr int kMaxStreamed = 64;
constexpr int64_t kReservedBytes = 1024;  // shared memory of every block that the system keeps

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int chunks_of(const ModelOperands& half) { return (half.key.width + 7) / 8; }

int splits_of(const ModelOperands& half) {
  auto splits = [](DType type) { return type == DType::bfloat16 ? 1 : type == DType::float16 ? 2 : 3; };
  return std::max(splits(half.query.type), splits(half.key.type));
}

std::string name(const char* kind, std::initializer_list<int> arguments) {
  std::string name = kind;
  for (int argument : arguments) name += "_" + std::to_string(argument);
  return name;
}

}  // namespace

Planes planes_of(const Relation& relation) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return {chunks_of(teacher) * splits_of(teacher), chunks_of(student) * splits_of(student), chunks_of(student),
          splits_of(student)};
}

std::string symmetric_kernel(const Relation& relation, bool causal) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("fused", {splits_of(student), chunks_of(teacher), splits_of(teacher), chunks_of(student), causal});
}

std::string row_stats_kernel(const Relation& relation, bool exact) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("row_stats",
              {exact, chunks_of(teacher), splits_of(teacher), chunks_of(student), splits_of(student)});
}

std::string row_wise_kernel(const Relation& relation, bool gradient) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("visit", {gradient ? splits_of(student) : 0, chunks_of(teacher), splits_of(teacher), chunks_of(student),
                        splits_of(student)});
}

int64_t symmetric_bytes(const Planes& planes, int tokens) {
  // Planes of 16 bytes a token, 8 float32 sums of gradients a chunk, a row's sums of exponentials, exact ones in two parts.
  int64_t token = 16 * (planes.teacher + planes.student) + 32 * planes.student_chunks;
  token += planes.student_splits == 3 ? 16 : 8;
  return kBlockStateBytes + kScratchBytes + tokens * token;
}

SymmetricPlan plan_symmetric(const DeviceProps& props, const Planes& planes, int64_t max_length) {
  const int64_t token = symmetric_bytes(planes, 1) - symmetric_bytes(planes, 0);
  const int64_t fit = (props.smem_per_block - symmetric_bytes(planes, 0)) / token / kTile * kTile;
  SymmetricPlan plan{};
  plan.tokens = static_cast<int>(std::max<int64_t>(0, std::min(fit, round_up(max_length, kTile))));
  if (plan.tokens == 0) return plan;
  plan.bytes = symmetric_bytes(planes, plan.tokens);
  // Pairs of a round are what warps can share. Most warps at work on a processor win: those resident, times how evenly
  // a round's pairs fall on them; of equals the smaller block, which waits less at its barriers.
  const int tile = (plan.tokens / kTile + 1) / 2;
  const int64_t room = std::max<int64_t>(1, props.smem_per_sm / (plan.bytes + kReservedBytes));
  const int most = kSymmetricWarps[planes.student_splits];
  double best = 0.0;
  for (int warps = 1; warps <= std::min(tile, most); ++warps) {
    const int blocks = static_cast<int>(std::min<int64_t>(room, most / warps));
    const int turns = (tile + warps - 1) / warps;
    const double busy = static_cast<double>(blocks) * tile / turns;
    if (busy > best) {
      best = busy;
      plan.warps = warps;
      plan.blocks = blocks;
    }
  }
  return plan;
}

int64_t row_wise_bytes(const Planes& planes, int own, int streamed, bool gradient) {
  int64_t bytes = 16 * (planes.teacher + planes.student) * (own + streamed) + 20 * (own + streamed) + kScratchBytes;
  if (gradient) bytes += 32 * planes.student_chunks * own;
  return round_up(bytes, 128);
}

RowWisePlan plan_row_wise(const DeviceProps& props, const Planes& planes, bool gradient) {
  // More own tokens a block mean fewer loads of the others; two tiles of others halve the barriers.
  for (int streamed = kMaxStreamed; streamed >= kTile; streamed /= 2)
    for (int warps = kRowWiseWarps; warps >= 1; warps /= 2) {
      if (warps == 1 && streamed > kTile) continue;
      int64_t bytes = row_wise_bytes(planes, warps * kTile, streamed, gradient);
      if (bytes <= props.smem_per_block) return {warps, streamed, bytes};
    }
  return {};
}

}  // namespace minilm::cuda
