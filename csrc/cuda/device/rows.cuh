// Everything that the fused kernel does not serve: cross relations, rows ("none") and their gradient, evaluation without
// gradient, negative scales, sequences beyond shared memory. A warp owns 32 tokens and streams the other side past them,
// tile by tile; a first launch leaves the log-sum-exps, a second KL and the gradient of own tokens, and of a cross
// relation a third the keys' gradient. No two warps write to one place. Scratch is O(S).
#pragma once

#include "visit.cuh"

namespace minilm::cuda {

// Shared memory of a block; `rows_bytes` in plan.h is its size.
struct Rows {
  Tokens own_t, own_s, other_t, other_s;
  RowStatistics own_rows, other_rows;
  float *grads, *own_weights, *other_weights;
  double* scratch;
  int own;

  MINILM_DEVICE Rows(char* memory, int own_tokens, int others, int planes_t, int planes_s, int grad_chunks)
      : own(own_tokens) {
    char* next = memory;
    auto tokens = [&](int count, int planes) {
      Tokens x{next, count * 16};
      next += planes * count * 16;
      return x;
    };
    auto floats = [&](int count) {
      float* x = reinterpret_cast<float*>(next);
      next += count * 4;
      return x;
    };
    own_t = tokens(own, planes_t);
    own_s = tokens(own, planes_s);
    other_t = tokens(others, planes_t);
    other_s = tokens(others, planes_s);
    grads = floats(grad_chunks * own * 8);
    own_rows = {floats(own), floats(own), floats(own), floats(own)};
    own_weights = floats(own);
    other_rows = {floats(others), floats(others), floats(others), floats(others)};
    other_weights = floats(others);
    scratch = reinterpret_cast<double*>(next);
  }
};

// What a block works on: `own` tokens from the sequence's token `first` on.
struct Task {
  const Relation* relation;
  Sequence sequence;
  int64_t n, head;
  int first;
  bool empty;
};

// Blocks are counted as if sequence n began at block ⌊starts[n] / own⌋ + n: that leaves it as many as it can need, and
// nothing but `starts` has to be known to find a block's sequence.
MINILM_DEVICE Task find_task(const Batch& batch, int own, double** partial) {
  const Common& call = batch.common;
  int64_t block = block_index();
  Task task;
  task.head = block % call.num_heads;
  block /= call.num_heads;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  const int64_t blocks = total / own + call.num_sequences;
  task.relation = &batch.relations[block / blocks];
  block %= blocks;
  int64_t low = 0, high = call.num_sequences - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (call.starts[middle] / own + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  task.n = low;
  bool valid = find_sequence(call, low, task.sequence);
  int64_t first = (block - call.starts[low] / own - low) * own;
  task.empty = !valid || first < 0 || first >= task.sequence.length || task.sequence.length < batch.shortest ||
               task.sequence.length > batch.longest;
  task.first = task.empty ? 0 : static_cast<int>(first);
  *partial = batch.partials + task.relation->index * batch.slots + batch.first_slot + block * call.num_heads + task.head;
  return task;
}

// Where the statistics of a task's rows lie in scratch memory.
MINILM_DEVICE int64_t first_statistics(const Batch& batch, const Task& task) {
  const Common& call = batch.common;
  const int64_t total = call.packed ? call.positions : call.num_sequences * call.positions;
  return (task.relation->index * call.num_heads + task.head) * total + task.sequence.first;
}

MINILM_DEVICE RowStatistics at(const Batch& batch, int64_t row) {
  const int64_t all = batch.statistics_stride;
  float* first = batch.statistics + row;
  return {first, first + all, first + 2 * all, first + 3 * all};
}

// Where the rows of a task's sequence lie in (R, N, A, S) or (R, A, T).
MINILM_DEVICE int64_t first_row(const Batch& batch, const Task& task) {
  const Common& call = batch.common;
  const int64_t matrices = call.packed ? 1 : call.num_sequences;
  return ((task.relation->index * matrices + task.sequence.batch) * call.num_heads + task.head) * call.positions;
}

// The other tokens that some own token sees, or that see one: [first, end).
struct Others {
  int first, end;
};
MINILM_DEVICE Others find_others(const Sequence& sequence, int first, int own, bool forward, bool backward) {
  int last = smaller(first + own, sequence.length) - 1;
  Others seen{0, bound_of(sequence, last)};
  Others seeing{first < sequence.prefix ? 0 : first / kTile * kTile, sequence.length};
  if (!backward) return seen;
  if (!forward) return seeing;
  return {0, sequence.length};
}

// Chunks and pieces of both models' tokens: those that a kernel is compiled for, or, where they are 0, those of the task.
template <int kChunksT, int kPiecesT, int kChunksS, int kPiecesS>
struct Shape {
  int given_chunks_t, given_pieces_t, given_chunks_s, given_pieces_s;

  MINILM_DEVICE explicit Shape(const Relation& relation)
      : given_chunks_t(chunks_of(relation.teacher.key.width)),
        given_pieces_t(larger(pieces_of(relation.teacher.query.type), pieces_of(relation.teacher.key.type))),
        given_chunks_s(chunks_of(relation.student.key.width)),
        given_pieces_s(larger(pieces_of(relation.student.query.type), pieces_of(relation.student.key.type))) {}
  MINILM_DEVICE int chunks_t() const { return kChunksT ? kChunksT : given_chunks_t; }
  MINILM_DEVICE int pieces_t() const { return kPiecesT ? kPiecesT : given_pieces_t; }
  MINILM_DEVICE int chunks_s() const { return kChunksS ? kChunksS : given_chunks_s; }
  MINILM_DEVICE int pieces_s() const { return kPiecesS ? kPiecesS : given_pieces_s; }
};

// kExact: as exp2_of, in the visit that follows as well.
template <bool kExact, int kChunksT, int kPiecesT, int kChunksS, int kPiecesS>
struct StatisticsKernel {
  static MINILM_DEVICE void run(const Batch& batch, char* memory) {
    const int own = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const Task task = find_task(batch, own, &partial);
    if (task.empty) return;
    const Sequence& sequence = task.sequence;
    const Relation& relation = *task.relation;
    const Shape<kChunksT, kPiecesT, kChunksS, kPiecesS> shape(relation);
    const int chunks_t = shape.chunks_t(), pieces_t = shape.pieces_t();
    const int chunks_s = shape.chunks_s(), pieces_s = shape.pieces_s();
    const Rows shared(memory, own, batch.capacity, chunks_t * pieces_t, chunks_s * pieces_s, 0);
    load_tokens(relation.teacher.query, sequence, task.head, task.first, own, writable(shared.own_t), shared.own_t.plane,
                chunks_t, pieces_t);
    load_tokens(relation.student.query, sequence, task.head, task.first, own, writable(shared.own_s), shared.own_s.plane,
                chunks_s, pieces_s);
    const Others others = find_others(sequence, task.first, own, true, false);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;

    PerRow most_t, most_s, total_t, total_s;
    MINILM_UNROLL for (int i = 0; i < 4; ++i) {
      most_t[i / 2][i % 2] = most_s[i / 2][i % 2] = kNothing;
      total_t[i / 2][i % 2] = total_s[i / 2][i % 2] = 0.0f;
    }
    MINILM_NO_UNROLL for (int first = others.first; first < others.end; first += batch.capacity) {
      sync_block();
      load_tokens(relation.teacher.key, sequence, task.head, first, batch.capacity, writable(shared.other_t),
                  shared.other_t.plane, chunks_t, pieces_t);
      load_tokens(relation.student.key, sequence, task.head, first, batch.capacity, writable(shared.other_s),
                  shared.other_s.plane, chunks_s, pieces_s);
      sync_block();
      MINILM_NO_UNROLL for (int tile = 0; tile < batch.capacity; tile += kTile) {
        const Place place{task.first + warp, first + tile};
        float score[2][4][4];
        scores(score, at(shared.own_t, warp), at(shared.other_t, tile), chunks_t, pieces_t);
        add_statistics<kExact>(most_t, total_t, score, scale_t, sequence, place);
        scores(score, at(shared.own_s, warp), at(shared.other_s, tile), chunks_s, pieces_s);
        add_statistics<kExact>(most_s, total_s, score, scale_s, sequence, place);
      }
    }
    const RowStatistics out = at(batch, first_statistics(batch, task) + task.first + warp);
    const int end = sequence.length - task.first - warp;
    write_statistics<kExact>(out.rest_t, out.most_t, most_t, total_t, end);
    write_statistics<kExact>(out.rest_s, out.most_s, most_s, total_s, end);
  }
};

// 1: the own tokens are rows; 2: they are keys; 3: they are both.
template <int kDirection>
struct Direction {
  static constexpr int value = kDirection;
};

// kPieces: of the student's tokens and of M in the gradient; 0: no gradient.
template <int kPieces, int kChunksT, int kPiecesT, int kChunksS, int kPiecesS>
struct VisitKernel {
  static constexpr bool kExact = kPieces == 0 || kPieces == 3;

  static MINILM_DEVICE void run(const Batch& batch, char* memory) {
    const Common& call = batch.common;
    const int own_tokens = thread_count(), warp = warp_index() * kTile;
    double* partial;
    const Task task = find_task(batch, own_tokens, &partial);
    if (task.empty) {
      if (thread_index() == 0 && call.values && !batch.keys) *partial = 0.0;
      return;
    }
    const Sequence& sequence = task.sequence;
    const Relation& relation = *task.relation;
    const bool forward = !batch.keys, backward = kPieces > 0 && (batch.keys || relation.self);
    const Matrix &own_x_t = batch.keys ? relation.teacher.key : relation.teacher.query;
    const Matrix &own_x_s = batch.keys ? relation.student.key : relation.student.query;
    const Matrix &other_x_t = batch.keys ? relation.teacher.query : relation.teacher.key;
    const Matrix &other_x_s = batch.keys ? relation.student.query : relation.student.key;
    const Shape<kChunksT, kPiecesT, kChunksS, kPieces ? kPieces : kPiecesS> shape(relation);
    const int chunks_t = shape.chunks_t(), pieces_t = shape.pieces_t();
    const int chunks_s = shape.chunks_s(), pieces_s = shape.pieces_s();
    const Rows shared(memory, own_tokens, batch.capacity, chunks_t * pieces_t, chunks_s * pieces_s,
                      kPieces ? chunks_s : 0);
    const int64_t statistics_at = first_statistics(batch, task), row_at = first_row(batch, task);

    load_tokens(own_x_t, sequence, task.head, task.first, own_tokens, writable(shared.own_t), shared.own_t.plane,
                chunks_t, pieces_t);
    load_tokens(own_x_s, sequence, task.head, task.first, own_tokens, writable(shared.own_s), shared.own_s.plane,
                chunks_s, pieces_s);
    load_rows(batch, sequence, statistics_at, row_at, task.first, own_tokens, shared.own_rows, shared.own_weights);
    if (kPieces)
      for (int i = thread_index(); i < chunks_s * own_tokens * 8; i += thread_count()) shared.grads[i] = 0.0f;
    const Others others = find_others(sequence, task.first, own_tokens, forward, backward);
    const float scale_t = relation.teacher.scale * kLog2e, scale_s = relation.student.scale * kLog2e;
    const View own = at(View{shared.own_t, shared.own_s, shared.own_rows, shared.own_weights}, warp);
    const View all{shared.other_t, shared.other_s, shared.other_rows, shared.other_weights};

    PerRow kl = {};
    MINILM_NO_UNROLL for (int first = others.first; first < others.end; first += batch.capacity) {
      sync_block();
      load_tokens(other_x_t, sequence, task.head, first, batch.capacity, writable(shared.other_t), shared.other_t.plane,
                  chunks_t, pieces_t);
      load_tokens(other_x_s, sequence, task.head, first, batch.capacity, writable(shared.other_s), shared.other_s.plane,
                  chunks_s, pieces_s);
      load_rows(batch, sequence, statistics_at, row_at, first, batch.capacity, shared.other_rows, shared.other_weights);
      sync_block();
      MINILM_NO_UNROLL for (int tile = 0; tile < batch.capacity; tile += kTile) {
        const Place place{task.first + warp, first + tile};
        const View other = at(all, tile);
        float* sums = shared.grads + warp * 8;
        auto visit = [&](auto direction) {
          visit_tile<kPieces, kExact, (direction.value != 2), (direction.value != 1)>(
              own, other, chunks_t, pieces_t, chunks_s, pieces_s, scale_t, scale_s, sequence, place, kl, sums,
              own_tokens * 8);
        };
        if (kPieces == 0 || !backward)
          visit(Direction<1>{});
        else if (forward)
          visit(Direction<kPieces ? 3 : 1>{});
        else
          visit(Direction<kPieces ? 2 : 1>{});
      }
    }

    if (forward) write_rows(batch, task, kl, row_at, warp, shared.scratch, partial);
    if (kPieces) {
      sync_block();
      write_gradient(batch, task, own_x_s.width, chunks_s, shared);
    }
  }

  static MINILM_DEVICE void load_rows(const Batch& batch, const Sequence& sequence, int64_t statistics_at,
                                      int64_t row_at, int first, int count, const RowStatistics& rows, float* weights) {
    const float* given = batch.common.row_grads;
    const RowStatistics from = at(batch, statistics_at + first);
    for (int i = thread_index(); i < count; i += thread_count()) {
      const bool real = first + i < sequence.length;
      rows.rest_t[i] = real ? from.rest_t[i] : 0.0f;
      rows.rest_s[i] = real ? from.rest_s[i] : 0.0f;
      if (kExact) {
        rows.most_t[i] = real ? from.most_t[i] : 0.0f;
        rows.most_s[i] = real ? from.most_s[i] : 0.0f;
      }
      weights[i] = !real ? 0.0f : given ? given[row_at + sequence.tokens[first + i]] : 1.0f;
    }
  }

  static MINILM_DEVICE void write_rows(const Batch& batch, const Task& task, PerRow& kl, int64_t row_at, int warp,
                                       double* scratch, double* partial) {
    const Common& call = batch.common;
    double value = 0.0;
    MINILM_UNROLL for (int i = 0; i < 4; ++i) {
      float row = kl[i / 2][i % 2];
      row += shuffle_xor(row, 1);
      row += shuffle_xor(row, 2);
      row = row < 0.0f ? 0.0f : row;
      const int token = task.first + warp + own_row(i / 2, i % 2);
      if (lane_index() % 4 == 0 && token < task.sequence.length) {
        if (call.rows) call.rows[row_at + task.sequence.tokens[token]] = row;
        value += row;
      }
    }
    if (call.values) {
      value = sum_of_block(value, scratch);
      if (thread_index() == 0) *partial = call.weights[task.n] * value;
    }
  }

  static MINILM_DEVICE void write_gradient(const Batch& batch, const Task& task, int width, int chunks,
                                           const Rows& shared) {
    const Common& call = batch.common;
    const Relation& relation = *task.relation;
    const float factor = relation.student.scale * (call.weights ? call.weights[task.n] : 1.0f);
    float* out = (batch.keys ? relation.key_grad : relation.query_grad) +
                 (task.sequence.batch * call.positions * call.num_heads + task.head) * width;
    for (int item = thread_index(); item < shared.own * chunks; item += thread_count()) {
      const int slot = item / chunks, chunk = item % chunks;
      if (task.first + slot < task.sequence.length)
        write_chunk(out + task.sequence.tokens[task.first + slot] * call.num_heads * width, width, chunk,
                    shared.grads + (chunk * shared.own + slot) * 8, factor);
    }
  }
};

// Of malformed sequences the values are NaN: on a device nothing checks cu_seqlens, and nobody waits to raise an error.
struct ReductionKernel {
  static MINILM_DEVICE void run(const Reduction& reduction, char* memory) {
    const Common& call = reduction.common;
    const int r = static_cast<int>(block_index());
    const double* partials = reduction.partials + reduction.index[r] * reduction.slots;
    const int64_t first = reduction.fused[r] ? 0 : reduction.fused_slots;
    const int64_t end = reduction.rows[r] ? reduction.slots : reduction.fused_slots;
    double value = 0.0, broken = 0.0;
    for (int64_t i = first + thread_index(); i < end; i += thread_count()) value += partials[i];
    for (int64_t n = thread_index(); n < call.num_sequences; n += thread_count()) {
      Sequence sequence;
      if (!find_sequence(call, n, sequence)) broken = 1.0;
    }
    value = sum_of_block(value, reinterpret_cast<double*>(memory));
    broken = sum_of_block(broken, reinterpret_cast<double*>(memory));
    if (thread_index() == 0)
      call.values[reduction.index[r]] = broken > 0.0 ? as_float(0x7fc00000u) : static_cast<float>(value);
  }
};

}  // namespace minilm::cuda
