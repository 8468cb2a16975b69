// SPDX-License-Identifier: Apache-2.0
// How kernels that work frame by frame walk several tensors at once: [outer positions][frames][inner positions].
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace vidkernels {

constexpr int kMaxOuterDims = 8;

// The axes other than the frames' are merged where the memory of all operands allows, outermost first; the last one,
// `inner`, has adjacent elements in every operand.
template <int kOperands>
struct FrameLayout {
  int64_t inner = 1;
  int dims = 0;
  int64_t size[kMaxOuterDims] = {};
  int64_t stride[kOperands][kMaxOuterDims] = {};
  int64_t frame_stride[kOperands] = {};

  VK_HOST_DEVICE int64_t outer() const {
    int64_t count = 1;
    for (int i = 0; i < dims; ++i) count *= size[i];
    return count;
  }

  // Offset of the `index`-th outer position of one operand.
  VK_HOST_DEVICE int64_t offset(int operand, int64_t index) const {
    int64_t at = 0;
    for (int i = dims - 1; i >= 0; --i) {
      at += index % size[i] * stride[operand][i];
      index /= size[i];
    }
    return at;
  }
};

// Fills `layout` for operands of `ndim` axes with equal sizes but for axis `frame_dim` (-1: none is special). Operands
// with null strides are absent. Axes are sorted by the strides of operand `order`. Returns false if the innermost axis
// is not adjacent in every operand.
template <int kOperands>
inline bool make_frame_layout(int64_t ndim, const int64_t* sizes, const int64_t* const (&strides)[kOperands], int order,
                              int64_t frame_dim, FrameLayout<kOperands>& layout) {
  int axes[kMaxOuterDims + 1];
  int count = 0;
  for (int64_t axis = 0; axis < ndim; ++axis) {
    if (axis == frame_dim || sizes[axis] == 1) continue;
    if (count == kMaxOuterDims + 1) return false;
    int at = count++;
    for (; at > 0 && strides[order][axes[at - 1]] < strides[order][axis]; --at) axes[at] = axes[at - 1];
    axes[at] = static_cast<int>(axis);
  }
  int64_t size[kMaxOuterDims + 1];
  int last_axis[kMaxOuterDims + 1];  // of each merged group, the innermost axis
  int groups = 0;
  for (int i = 0; i < count; ++i) {
    bool merges = groups > 0;
    for (int k = 0; k < kOperands && merges; ++k) {
      if (strides[k] != nullptr) merges = strides[k][last_axis[groups - 1]] == strides[k][axes[i]] * sizes[axes[i]];
    }
    const int to = merges ? groups - 1 : groups++;
    size[to] = merges ? size[to] * sizes[axes[i]] : sizes[axes[i]];
    last_axis[to] = axes[i];
  }
  layout.dims = groups > 0 ? groups - 1 : 0;
  layout.inner = groups > 0 ? size[groups - 1] : 1;
  for (int k = 0; k < kOperands; ++k) {
    if (strides[k] == nullptr) continue;
    if (groups > 0 && strides[k][last_axis[groups - 1]] != 1) return false;
    layout.frame_stride[k] = frame_dim < 0 ? 0 : strides[k][frame_dim];
    for (int i = 0; i < layout.dims; ++i) layout.stride[k][i] = strides[k][last_axis[i]];
  }
  for (int i = 0; i < layout.dims; ++i) layout.size[i] = size[i];
  return true;
}

}  // namespace vidkernels
