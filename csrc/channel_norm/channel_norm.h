// SPDX-License-Identifier: Apache-2.0
// Parameters of the channel norm kernels, and the layout rules that the CPU and CUDA bindings share.
//
//   xhat = (x - mean) * rstd     mean, rstd over C at one position; mean is 0 except for `layer`
//   z = xhat * weight + bias,    y = z or z * sigmoid(z)
// and backwards, with dz = dy * dy/dz and g = dz * weight:
//   dweight = sum dz * xhat,  dbias = sum dz,  dx = rstd * (g - [layer] mean(g) - xhat * mean(g * xhat)).
// The backward computes mean and rstd again from x, which it reads anyway: nothing is saved but x.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace vidkernels {

enum class NormKind : int32_t { layer = 0, rms = 1, l2 = 2 };

constexpr int kMaxPositionDims = 8;

// Where the C values of a position are, in x and in y (dy and dx have y's strides). Axes other than the channel's are
// merged where memory allows and sorted, outermost first.
struct ChannelLayout {
  int64_t channels = 1, x_channel = 1, y_channel = 1;
  int dims = 1;
  int64_t size[kMaxPositionDims] = {1};
  int64_t x_stride[kMaxPositionDims] = {1};
  int64_t y_stride[kMaxPositionDims] = {1};
  bool rows = true;  // the channels of a position are adjacent in memory (NDHWC); otherwise the positions are (NCDHW)

  VK_HOST_DEVICE int64_t positions() const {
    int64_t count = 1;
    for (int i = 0; i < dims; ++i) count *= size[i];
    return count;
  }
  VK_HOST_DEVICE int64_t inner() const { return size[dims - 1]; }
};

// One-dimensional affine parameter; data is null where it is missing.
struct Affine {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

struct ChannelNormParams {
  const void* x = nullptr;
  void* y = nullptr;
  Affine weight, bias;
  ChannelLayout layout;
  NormKind kind = NormKind::layer;
  bool silu = false;
  double eps = 0;
  DType dtype = DType::float32;
};

struct ChannelNormBackwardParams {
  ChannelNormParams forward;  // y is unused
  const void* dy = nullptr;
  void* dx = nullptr;  // null where not wanted, like dweight and dbias
  void* dweight = nullptr;
  void* dbias = nullptr;
  DType dweight_dtype = DType::float32, dbias_dtype = DType::float32;
  void* partial = nullptr;  // CUDA: [partials, 2, C] sums of dz * xhat and of dz, in the accumulation type
};

// Fills `layout` for a tensor of `ndim` axes with the channel at `dim`. Returns false if neither the channels nor the
// innermost positions are adjacent in both x and y; the binding then copies x into y's strides first.
inline bool make_channel_layout(int64_t ndim, const int64_t* sizes, const int64_t* x_strides, const int64_t* y_strides,
                                int64_t dim, ChannelLayout& layout) {
  layout.channels = sizes[dim];
  layout.x_channel = layout.channels > 1 ? x_strides[dim] : 1;
  layout.y_channel = layout.channels > 1 ? y_strides[dim] : 1;
  int count = 0;
  for (int64_t axis = 0; axis < ndim; ++axis) {
    if (axis == dim || sizes[axis] == 1) continue;
    if (count == kMaxPositionDims) return false;
    int at = count++;
    for (; at > 0 && layout.y_stride[at - 1] < y_strides[axis]; --at) {
      layout.size[at] = layout.size[at - 1];
      layout.x_stride[at] = layout.x_stride[at - 1];
      layout.y_stride[at] = layout.y_stride[at - 1];
    }
    layout.size[at] = sizes[axis];
    layout.x_stride[at] = x_strides[axis];
    layout.y_stride[at] = y_strides[axis];
  }
  layout.dims = 0;
  for (int i = 0; i < count; ++i) {
    const int last = layout.dims - 1;
    const bool merges = last >= 0 && layout.x_stride[last] == layout.x_stride[i] * layout.size[i] &&
                        layout.y_stride[last] == layout.y_stride[i] * layout.size[i];
    const int to = merges ? last : layout.dims++;
    layout.size[to] = merges ? layout.size[to] * layout.size[i] : layout.size[i];
    layout.x_stride[to] = layout.x_stride[i];
    layout.y_stride[to] = layout.y_stride[i];
  }
  if (layout.dims == 0) {
    layout.dims = 1;
    layout.size[0] = layout.x_stride[0] = layout.y_stride[0] = 1;
  }
  const int inner = layout.dims - 1;
  const bool planes = layout.x_stride[inner] == 1 && layout.y_stride[inner] == 1;
  layout.rows = layout.x_channel == 1 && layout.y_channel == 1 && !(planes && layout.channels == 1);
  return layout.rows || planes;
}

VK_DECLARE_CPU(channel_norm_fwd, ChannelNormParams)
VK_DECLARE_CPU(channel_norm_bwd, ChannelNormBackwardParams)

}  // namespace vidkernels
