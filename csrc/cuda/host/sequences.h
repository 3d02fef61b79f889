// The arrays of a call that depend on its masks: their place in scratch memory, and the launches that fill them.
#pragma once

#include <vector>

#include "cuda/device/launch_params.h"
#include "gpu.h"

namespace minilm::cuda {

class Sequences {
public:
  Sequences(const Call& call, const Masks& masks);

  int64_t bytes() const;

  // Sets the arrays of a call, and adds the launches. `scratch`: device memory of bytes() bytes.
  void operator()(Call& call, char* scratch, std::vector<Launch>& launches) const;

private:
  int64_t place(SequenceParams& params, char* scratch) const;

  SequenceParams params_{};
  bool lists_, weighs_;  // the kernels that the call needs
};

}  // namespace minilm::cuda
