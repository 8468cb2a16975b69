// SPDX-License-Identifier: Apache-2.0
// For bindings: torch's stable ABI (torch >= 2.10) and the few helpers that every binding needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace vidkernels {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) { return static_cast<DType>(tensor.scalar_type()); }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

// Whether two tensors of one shape have their elements in the same order and at the same distances.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) > 1 && a.stride(axis) != b.stride(axis)) return false;
  }
  return true;
}

// A contiguous tensor of `sizes` on the device of `like`, uninitialised.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace vidkernels
