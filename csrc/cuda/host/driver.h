// The CUDA backend's entry: which kernels a call needs, and their launches. Nothing here knows torch.
#pragma once

#include <string>

#include "../device/relation.h"

namespace minilm::cuda {

// Why a device cannot serve these relations; empty: it can.
std::string unsupported_reason(const Relation* relations, int64_t num_relations, bool gradient, const DeviceProps& props,
                    int capability);

// Device memory that `run` needs; −1: the call has more thread blocks than a launch takes.
int64_t scratch_bytes(const Call& call, const DeviceProps& props);

// Queues everything on the call's stream; returns null, or what went wrong. `scratch`: device memory, 16-byte aligned.
// Where kernels are not loaded yet, nothing is queued, and `missing` names them, one a line.
const char* run(const Call& call, const DeviceProps& props, int device, void* scratch, std::string& missing);

}  // namespace minilm::cuda
