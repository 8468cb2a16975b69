// SPDX-License-Identifier: Apache-2.0
// What the bindings of both devices share: tensors and options of torch's, as parameters.
#pragma once

#include "causal_conv3d/causal_conv3d.h"
#include "common/stable.h"

namespace vidkernels {

using Ints = std::vector<int64_t>;

// Strides of [B, C, T, H, W] without the channels, which must lie next to each other.
inline void strides_of(const Tensor& tensor, const char* name, int64_t (&stride)[4]) {
  STD_TORCH_CHECK(tensor.dim() == 5, "causal_conv3d: ", name, ": expected [B, C, T, H, W]");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, "causal_conv3d: ", name, ": expected channels_last_3d");
  const int axes[4] = {0, 2, 3, 4};
  for (int i = 0; i < 4; ++i) stride[i] = tensor.stride(axes[i]);
}

inline void copy3(const Ints& from, int64_t (&to)[3]) {
  STD_TORCH_CHECK(from.size() == 3, "causal_conv3d: expected three numbers (t, h, w)");
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

inline void describe_tensors(CausalConv3dParams& p, Tensor& y, const Tensor& x, const Tensor& weight) {
  p.y = y.data_ptr();
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  strides_of(y, "y", p.y_stride);
  strides_of(x, "x", p.x_stride);
  STD_TORCH_CHECK(weight.dim() == 5, "causal_conv3d: weight: expected [K, C, kt, kh, kw]");
  for (int i = 0; i < 5; ++i) p.weight_stride[i] = weight.stride(i);
  for (int i = 0; i < 3; ++i) {
    p.in_size[i] = x.size(2 + i);
    p.out_size[i] = y.size(2 + i);
    p.kernel[i] = weight.size(2 + i);
  }
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.filters = weight.size(0);
  p.dtype = dtype_of(x);
  p.weight_dtype = dtype_of(weight);
}

inline void describe_epilogue(CausalConv3dParams& p, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual, int64_t activation) {
  p.bias = data_or_null(bias);
  p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
  p.residual = data_or_null(residual);
  if (residual.has_value()) strides_of(*residual, "residual", p.residual_stride);
  p.silu = activation != 0;
}

inline void describe_padding(CausalConv3dParams& p, const std::optional<Tensor>& history, const Ints& stride,
                             const Ints& dilation, const Ints& before, int64_t time_mode, int64_t space_mode) {
  p.history = data_or_null(history);
  p.history_frames = history.has_value() ? history->size(2) : 0;
  if (history.has_value()) strides_of(*history, "history", p.history_stride);
  copy3(stride, p.stride);
  copy3(dilation, p.dilation);
  copy3(before, p.before);
  p.replicate_time = time_mode != 0;
  p.replicate_space = space_mode != 0;
}

}  // namespace vidkernels
