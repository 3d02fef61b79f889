// Entry points of the CPU backend. This header does not depend on PyTorch.
#pragma once

#include "common/relation.h"

namespace minilm::cpu {

// The caller's thread pool: `run` calls body(context, 0) ... body(context, count - 1) and waits for them.
struct ThreadPool {
  int64_t num_threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// Names of the instruction sets that this processor supports, best first, ended by null.
const char* const* instruction_sets();

// Computes a call. Returns null, or an error message. `relations`: an array of call.num_relations entries.
// `instruction_set`: a name that instruction_sets() returned.
const char* run(const Call& call, const Relation* relations, const ThreadPool& threads, const char* instruction_set);

}  // namespace minilm::cpu
