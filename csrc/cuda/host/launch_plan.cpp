// Chooses launch configurations. The sizes must equal those of SymmetricLayout (symmetric.cuh), Window (segments.cuh)
// and RowWiseLayout (row_wise.cuh).

#include "launch_plan.h"

#include <algorithm>
#include <initializer_list>

namespace minilm::cuda {
namespace {

constexpr int kMaxStreamed = 64;
constexpr int64_t kReservedBytes = 1024;  // shared memory that CUDA reserves in every block
constexpr int kWaves = 2, kMaxParts = 15;

int chunks_of(const ModelOperands& half) { return (half.key.width + 7) / 8; }

int splits_of(const ModelOperands& half) {
  auto splits = [](DType dtype) { return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3; };
  return std::max(splits(half.query.dtype), splits(half.key.dtype));
}

int row_wise_format_of(const ModelOperands& half, const Relation& relation, bool gradient) {
  return row_wise_format(splits_of(half), relation.self && gradient);
}

// In a self relation, queries and keys are the same tokens.
int format_of(const ModelOperands& half) {
  return half.key.dtype == DType::bfloat16 ? 1 : half.key.dtype == DType::float16 ? kFloat16 : kFloat32;
}

std::string name(const char* kind, std::initializer_list<int> arguments) {
  std::string name = kind;
  for (int argument : arguments) name += "_" + std::to_string(argument);
  return name;
}

}  // namespace

Planes row_wise_planes_of(const Relation& relation, bool gradient) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  const int chunks_t = chunks_of(teacher), chunks_s = chunks_of(student);
  return {score_planes(row_wise_format_of(teacher, relation, gradient), chunks_t),
          score_planes(row_wise_format_of(student, relation, gradient), chunks_s),
          chunks_s,
          splits_of(student),
          {}};
}

Planes symmetric_planes_of(const Relation& relation, const DeviceProps& props) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  const int chunks_t = chunks_of(teacher), format_t = format_of(teacher);
  const int chunks_s = chunks_of(student), format_s = format_of(student);
  return {score_planes(format_t, chunks_t), student_planes(format_s, chunks_s), chunks_s, splits_in(format_s),
          symmetric_schedule(format_s, chunks_t, format_t, chunks_s, props.capability)};
}

std::string symmetric_kernel(const Relation& relation, bool causal) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("symmetric", {format_of(student), chunks_of(teacher), format_of(teacher), chunks_of(student), causal});
}

std::string segment_kernel(const Relation& relation, bool causal) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("segments", {format_of(student), chunks_of(teacher), format_of(teacher), chunks_of(student), causal});
}

// Accurate exponentials are for float32 students, and for calls without gradient, which report the KL divergence
// itself.
std::string row_stats_kernel(const Relation& relation, bool gradient) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("row_stats", {!gradient || splits_of(student) == 3, chunks_of(teacher),
                            row_wise_format_of(teacher, relation, gradient), chunks_of(student),
                            row_wise_format_of(student, relation, gradient)});
}

std::string row_wise_kernel(const Relation& relation, bool gradient) {
  const ModelOperands &teacher = relation.teacher, &student = relation.student;
  return name("row_wise",
              {gradient ? splits_of(student) : 0, chunks_of(teacher), row_wise_format_of(teacher, relation, gradient),
               chunks_of(student), row_wise_format_of(student, relation, gradient)});
}

int64_t symmetric_bytes(const Planes& planes, int tokens) {
  // A token needs 16 bytes per plane, 8 float32 gradients per chunk, and its row statistics. Maxima are stored only
  // with 3 splits. Strips need four words.
  int64_t token = 16 * (planes.teacher + planes.student) + 32 * planes.student_chunks;
  token += planes.student_splits == 3 && planes.schedule.strip_rows   ? 32
           : planes.student_splits == 3 || planes.schedule.strip_rows ? 16
                                                                      : 8;
  return kBlockStateBytes + kScratchBytes + tokens * token;
}

SymmetricPlan plan_symmetric(const DeviceProps& props, const Planes& planes, int64_t max_length) {
  const int64_t token = symmetric_bytes(planes, 1) - symmetric_bytes(planes, 0);
  const int64_t unit = std::max(planes.schedule.strip_rows, kTile);
  const int64_t fit = (props.smem_per_block - symmetric_bytes(planes, 0)) / token / unit * unit;
  SymmetricPlan plan{};
  plan.tokens = static_cast<int>(std::max<int64_t>(0, std::min(fit, round_up(max_length, unit))));
  if (plan.tokens == 0) return plan;
  plan.bytes = symmetric_bytes(planes, plan.tokens);
  // Choose the number of warps per block that keeps most warps of an SM busy: the number of resident warps, times the
  // fraction of them that have strips, or pairs of tiles, in a round. On a tie the smaller block wins: its barriers are
  // cheaper.
  const int parts =
      planes.schedule.strip_rows ? plan.tokens / planes.schedule.strip_rows : (plan.tokens / kTile + 1) / 2;
  const int64_t room = std::max<int64_t>(1, props.smem_per_sm / (plan.bytes + kReservedBytes));
  double best = 0.0;
  for (int warps = 1; warps <= std::min(parts, planes.schedule.warps); ++warps) {
    const int blocks = static_cast<int>(std::min<int64_t>(room, planes.schedule.warps / warps));
    const int turns = (parts + warps - 1) / warps;
    const double busy = static_cast<double>(blocks) * parts / turns;
    if (busy > best) {
      best = busy;
      plan.warps = warps;
      plan.blocks = blocks;
    }
  }
  return plan;
}

int64_t segment_bytes(const Planes& planes, int window) {
  // Sums or factors take four words, and eight with float32 students.
  const int64_t tokens = 16 * (planes.teacher + planes.student + (planes.student_splits == 3 ? 2 : 1));
  return kBlockStateBytes + kScratchBytes + window * (2 * tokens + 32 * planes.student_chunks);
}

SegmentPlan plan_segments(const DeviceProps& props, const Planes& planes) {
  // Most warps per SM, weighted by the share of time that is left beside loading a window: loading is taken to cost as
  // much as the pairs with 64 tokens. On a tie the larger block wins.
  SegmentPlan plan{};
  double best = 0.0;
  if (planes.schedule.strip_rows == 0) return plan;
  for (int warps = 1; warps <= segment_warps(planes.schedule); ++warps) {
    const int window = warps * planes.schedule.strip_rows;
    const int64_t bytes = segment_bytes(planes, window);
    if (bytes > props.smem_per_block) break;
    const int64_t room = std::max<int64_t>(1, props.smem_per_sm / (bytes + kReservedBytes));
    const int blocks = static_cast<int>(std::min<int64_t>(room, planes.schedule.warps / warps));
    const double busy = static_cast<double>(warps * blocks) * window / (window + 64);
    if (busy >= best) {
      best = busy;
      plan = {warps, window, blocks, bytes};
    }
  }
  return plan;
}

int plan_parts(const DeviceProps& props, int64_t heads, int64_t windows) {
  int parts = 1;
  while (parts + 2 <= std::min<int64_t>(kMaxParts, windows) && parts * heads < 2 * kWaves * props.processors)
    parts += 2;
  return parts;
}

int64_t row_wise_bytes(const Planes& planes, int own, int streamed, bool gradient) {
  int64_t bytes = 16 * (planes.teacher + planes.student) * (own + streamed) + 20 * (own + streamed) + kScratchBytes;
  bytes += 32 * (planes.teacher / 3 + planes.student / 3);  // means of float32 keys
  if (gradient) bytes += 32 * planes.student_chunks * own;
  return round_up(bytes, 128);
}

RowWisePlan plan_row_wise(const DeviceProps& props, const Planes& planes, bool gradient) {
  // More own tokens per block reduce the loads of other tokens. Two streamed tiles halve the number of barriers.
  for (int streamed = kMaxStreamed; streamed >= kTile; streamed /= 2)
    for (int warps = kRowWiseWarps; warps >= 1; warps /= 2) {
      if (warps == 1 && streamed > kTile) continue;
      int64_t bytes = row_wise_bytes(planes, warps * kTile, streamed, gradient);
      if (bytes <= props.smem_per_block) return {warps, streamed, bytes};
    }
  return {};
}

}  // namespace minilm::cuda
