// Helpers of both bindings. They convert PyTorch tensors to the structs of relation.h. They use PyTorch's stable ABI
// only, so that one build works with every PyTorch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "common/relation.h"

namespace minilm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

inline TensorView view_of(const Tensor& x) {
  const int first = x.dim() == 3 ? 0 : 1;  // the dimension of positions
  TensorView view;
  view.data = x.const_data_ptr();
  view.batch_stride = first == 0 ? 0 : x.stride(0);
  view.position_stride = x.stride(first);
  view.head_stride = x.stride(first + 1);
  view.feature_stride = x.stride(first + 2);
  view.width = static_cast<int32_t>(x.size(first + 2));
  view.dtype = dtype_of(x);
  return view;
}

inline ModelOperands operands_of(const Tensor& query, const Tensor& key) {
  const int heads = query.dim() - 2;
  return {view_of(query), view_of(key), 1.0f, static_cast<int32_t>(query.size(heads) / key.size(heads))};
}

template <class T>
const T* input_data(const OptionalTensor& x, ScalarType dtype) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == dtype && x->is_contiguous(),
                  "expected the operator's dtype and contiguous memory");
  return static_cast<const T*>(x->const_data_ptr());
}

inline float* output_data(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "expected contiguous float32 memory");
  return static_cast<float*>(x.mutable_data_ptr());
}

// Relation r takes its queries from tensor indices[2r] and its keys from tensor indices[2r + 1]. The scales of the
// returned relations are 1, and their gradients are null.
inline std::vector<Relation> relations_of(const Tensors& teacher, const Tensors& student,
                                          const std::vector<int64_t>& indices) {
  std::vector<Relation> relations(indices.size() / 2);
  for (size_t r = 0; r < relations.size(); ++r) {
    const int64_t query = indices[2 * r], key = indices[2 * r + 1];
    Relation& relation = relations[r];
    relation = {};
    relation.teacher = operands_of(teacher.at(query), teacher.at(key));
    relation.student = operands_of(student.at(query), student.at(key));
    relation.self = query == key;
    relation.index = static_cast<int32_t>(r);
  }
  return relations;
}

// The same, with scales and gradients. `scales` has two entries per relation, teacher and student. `grads` has one
// entry per self relation and two per cross relation, or is empty.
inline std::vector<Relation> relations_of(const Tensors& teacher, const Tensors& student,
                                          const std::vector<int64_t>& indices, const std::vector<double>& scales,
                                          const Tensors& grads) {
  std::vector<Relation> relations = relations_of(teacher, student, indices);
  size_t next = 0;
  for (size_t r = 0; r < relations.size(); ++r) {
    Relation& relation = relations[r];
    relation.teacher.scale = static_cast<float>(scales.at(2 * r));
    relation.student.scale = static_cast<float>(scales.at(2 * r + 1));
    if (grads.empty()) continue;
    relation.query_grad = output_data(grads.at(next++));
    relation.key_grad = relation.self ? relation.query_grad : output_data(grads.at(next++));
  }
  return relations;
}

}  // namespace minilm
