// SPDX-License-Identifier: Apache-2.0
// Parameters of the group norm kernels. A sample is what shares statistics besides the group: a clip, or one frame.
//
//   xhat = (x - mean) * rstd     mean, rstd (float64) over the C / G channels of a group and all positions of a sample
//   z = xhat * weight + bias,    y = z or z * sigmoid(z)
// and backwards, with dz = dy * dy/dz, per sample and channel A = sum dz * xhat and B = sum dz:
//   dweight = sum over samples of A,  dbias = sum of B,
//   dx = rstd * (dz * weight - mean_group(weight * B) - xhat * mean_group(weight * A)).
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace vidkernels {

struct GroupNormParams {
  const void* x = nullptr;
  void* y = nullptr;
  const void* weight = nullptr;  // null where missing, like bias
  const void* bias = nullptr;
  DType dtype = DType::float32, weight_dtype = DType::float32, bias_dtype = DType::float32;
  double* mean = nullptr;  // [samples, groups]
  double* rstd = nullptr;
  int64_t batch = 1, frames = 1;  // samples = batch * frames; frames is 1 where the clip has one statistic
  int64_t batch_stride = 0, frame_stride = 0;
  int64_t channels = 1, groups = 1, positions = 1;
  // One of the two strides is 1: the channels of a position are adjacent (rows), or the positions of a channel.
  int64_t channel_stride = 1, position_stride = 1;
  bool silu = false;
  double eps = 0;

  bool rows() const { return channel_stride == 1 && channels > 1; }
  int64_t samples() const { return batch * frames; }
  int64_t offset(int64_t sample) const { return sample / frames * batch_stride + sample % frames * frame_stride; }
};

struct GroupNormBackwardParams {
  GroupNormParams forward;  // mean and rstd as the forward left them; y is unused
  const void* dy = nullptr;
  void* dx = nullptr;  // null where not wanted, like dweight and dbias
  void* dweight = nullptr;
  void* dbias = nullptr;
};

VK_DECLARE_CPU(group_norm_fwd, GroupNormParams)
VK_DECLARE_CPU(group_norm_bwd, GroupNormBackwardParams)

}  // namespace vidkernels
