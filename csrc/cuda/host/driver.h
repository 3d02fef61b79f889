// Entry points of the CUDA backend's host code. This header does not depend on PyTorch.
#pragma once

#include <string>
#include <vector>

#include "common/relation.h"
#include "gpu.h"

namespace minilm::cuda {

// Returns the reason why a device cannot compute these relations, or an empty string.
std::string unsupported_reason(const std::vector<Relation>& relations, bool gradient, const DeviceProps& props);

// Bytes of device memory that `run` needs, or -1 if the call has more thread blocks than a launch may have.
int64_t scratch_bytes(const Call& call, const Masks& masks, const Relation* relations, const DeviceProps& props);

// Launches the kernels of a call, whose arrays of tokens and weights are made from `masks`. Returns null, or an error
// message. `weights`: factors of the relations in their sum, or null for a value per relation. `scratch`: device
// memory, aligned to 16 bytes. If some kernels are not loaded yet, nothing is launched, and `missing` receives their
// names, one per line.
const char* run(Call call, const Masks& masks, const double* weights, const Relation* relations,
                const DeviceProps& props, int device, void* stream, void* scratch, std::string& missing);

// Launches the kernels that compute `outputs`, likewise.
const char* scale(const std::vector<ScaledOutput>& outputs, const std::vector<ScaledPart>& parts, const float* upstream,
                  int64_t upstream_stride, int device, void* stream, std::string& missing);

}  // namespace minilm::cuda
