// See plan.h. The layouts are those of Fused (fused.cuh) and Rows (rows.cuh).

#include "plan.h"

#include <algorithm>
#include <initializer_list>

namespace minilm::cuda {
namespace {

constexpr int kMostOthers = 64;
constexpr int64_t kReserved = 1024;  // shared memory of every block that the system keeps

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int chunks_of(const Half& half) { return (half.key.width + 7) / 8; }

int pieces_of(const Half& half) {
  auto pieces = [](Type type) { return type == Type::bfloat16 ? 1 : type == Type::float16 ? 2 : 3; };
  return std::max(pieces(half.query.type), pieces(half.key.type));
}

std::string name(const char* kind, std::initializer_list<int> arguments) {
  std::string name = kind;
  for (int argument : arguments) name += "_" + std::to_string(argument);
  return name;
}

}  // namespace

Planes planes_of(const Relation& relation) {
  const Half &teacher = relation.teacher, &student = relation.student;
  return {chunks_of(teacher) * pieces_of(teacher), chunks_of(student) * pieces_of(student), chunks_of(student),
          pieces_of(student)};
}

std::string fused_kernel(const Relation& relation, bool causal) {
  const Half &teacher = relation.teacher, &student = relation.student;
  return name("fused", {pieces_of(student), chunks_of(teacher), pieces_of(teacher), chunks_of(student), causal});
}

std::string statistics_kernel(const Relation& relation, bool exact) {
  const Half &teacher = relation.teacher, &student = relation.student;
  return name("statistics",
              {exact, chunks_of(teacher), pieces_of(teacher), chunks_of(student), pieces_of(student)});
}

std::string visit_kernel(const Relation& relation, bool gradient) {
  const Half &teacher = relation.teacher, &student = relation.student;
  return name("visit", {gradient ? pieces_of(student) : 0, chunks_of(teacher), pieces_of(teacher), chunks_of(student),
                        pieces_of(student)});
}

int64_t fused_bytes(const Planes& planes, int tokens) {
  // Planes of 16 bytes a token, 8 float32 sums of gradients a chunk, a row's sums of exponentials, exact ones in two parts.
  int64_t token = 16 * (planes.teacher + planes.student) + 32 * planes.student_chunks;
  token += planes.student_pieces == 3 ? 16 : 8;
  return kHeaderBytes + kScratchBytes + tokens * token;
}

FusedPlan plan_fused(const Limits& limits, const Planes& planes, int64_t longest) {
  const int64_t token = fused_bytes(planes, 1) - fused_bytes(planes, 0);
  const int64_t fit = (limits.shared_per_block - fused_bytes(planes, 0)) / token / kTile * kTile;
  FusedPlan plan{};
  plan.tokens = static_cast<int>(std::max<int64_t>(0, std::min(fit, round_up(longest, kTile))));
  if (plan.tokens == 0) return plan;
  plan.bytes = fused_bytes(planes, plan.tokens);
  // Pairs of a round are what warps can share. Most warps at work on a processor win: those resident, times how evenly
  // a round's pairs fall on them; of equals the smaller block, which waits less at its barriers.
  const int pairs = (plan.tokens / kTile + 1) / 2;
  const int64_t room = std::max<int64_t>(1, limits.shared_per_processor / (plan.bytes + kReserved));
  const int most = kFusedWarps[planes.student_pieces];
  double best = 0.0;
  for (int warps = 1; warps <= std::min(pairs, most); ++warps) {
    const int blocks = static_cast<int>(std::min<int64_t>(room, most / warps));
    const int turns = (pairs + warps - 1) / warps;
    const double busy = static_cast<double>(blocks) * pairs / turns;
    if (busy > best) {
      best = busy;
      plan.warps = warps;
      plan.blocks = blocks;
    }
  }
  return plan;
}

int64_t rows_bytes(const Planes& planes, int own, int others, bool gradient) {
  int64_t bytes = 16 * (planes.teacher + planes.student) * (own + others) + 20 * (own + others) + kScratchBytes;
  if (gradient) bytes += 32 * planes.student_chunks * own;
  return round_up(bytes, 128);
}

RowsPlan plan_rows(const Limits& limits, const Planes& planes, bool gradient) {
  // More own tokens a block mean fewer loads of the others; two tiles of others halve the barriers.
  for (int others = kMostOthers; others >= kTile; others /= 2)
    for (int warps = kRowsWarps; warps >= 1; warps /= 2) {
      if (warps == 1 && others > kTile) continue;
      int64_t bytes = rows_bytes(planes, warps * kTile, others, gradient);
      if (bytes <= limits.shared_per_block) return {warps, others, bytes};
    }
  return {};
}

}  // namespace minilm::cuda
