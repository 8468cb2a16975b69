// SPDX-License-Identifier: Apache-2.0
// For bindings of quantizers: the token layout of stable-ABI tensors.
#pragma once

#include "common/stable.h"
#include "common/token_layout.h"

namespace vidkernels {

// Layout of tensors of one shape with channels at `axis`; false where the token axes take a copy.
inline bool token_layout(const std::vector<const Tensor*>& tensors, int64_t axis, int64_t codebooks,
                         TokenLayout* layout) {
  const std::vector<int64_t> sizes = sizes_of(*tensors[0]);
  std::vector<std::vector<int64_t>> strides;
  std::vector<const int64_t*> rows;
  for (const Tensor* tensor : tensors) {
    const auto view = tensor->strides();
    strides.emplace_back(view.begin(), view.end());
  }
  for (const auto& row : strides) rows.push_back(row.data());
  return collapse_tokens(sizes.data(), static_cast<int>(sizes.size()), static_cast<int>(axis), rows.data(),
                         static_cast<int>(rows.size()), codebooks, layout);
}

// Shape of one integer per token: `sizes` without the channel axis, with a last axis of codebooks if there are several.
inline std::vector<int64_t> index_sizes(const std::vector<int64_t>& sizes, int64_t axis, int64_t codebooks) {
  std::vector<int64_t> result = sizes;
  result.erase(result.begin() + axis);
  if (codebooks > 1) result.push_back(codebooks);
  return result;
}

// Shape of the codes of such integers.
inline std::vector<int64_t> code_sizes(const Tensor& indices, int64_t axis, int64_t codebooks, int64_t channels) {
  std::vector<int64_t> result = sizes_of(indices);
  if (codebooks > 1) result.pop_back();
  result.insert(result.begin() + axis, codebooks * channels);
  return result;
}

}  // namespace vidkernels
