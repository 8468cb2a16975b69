// SPDX-License-Identifier: Apache-2.0
// Parameters of the CPU convolution. All tensors are [B, T, H, W, C] with stride 1 along the channels.
#pragma once

#include "common/cpu.h"

namespace vidkernels {

enum class ConvAlgorithm : int64_t {
  direct = 0,
  winograd = 1,            // spatial 3x3 of stride 1: F(2x2, 3x3), 2.25 times fewer multiplications
  winograd_upsampled = 2,  // the same on a nearest-doubled image, read before doubling: 4 times fewer
  few_filters = 3,         // at most 4 filters, stride 1 in space: taps as filters of a pointwise convolution
  // The same with products of bfloat16 in pairs, where processor and tensors have them; otherwise as 0 and 3.
  direct_pairs = 4,
  few_filters_pairs = 5,
  direct_tiles = 6,  // the same by the tile registers of AMX; otherwise as direct_pairs
};

struct CausalConv3dParams {
  void* y;
  const void* x;
  const void* history;   // null: none
  const void* residual;  // null: none; has the size of y
  const void* bias;      // null: none; [K], dtype of weight
  const void* weight;    // [K, C, kt, kh, kw], any strides
  // Elements from one batch entry, frame, row and column to the next.
  int64_t y_stride[4], x_stride[4], history_stride[4], residual_stride[4];
  int64_t weight_stride[5];
  int64_t bias_stride;
  int64_t batch, channels, filters;
  // Along t, h, w.
  int64_t in_size[3], out_size[3], kernel[3], stride[3], dilation[3];
  // `dilation` may be negative in the direct algorithms: mirrored taps.
  int64_t before[3];  // padding in front of the first frame, row, column
  int64_t history_frames;
  bool replicate_time, replicate_space, silu;
  ConvAlgorithm algorithm;
  DType dtype, weight_dtype;
};

// Gradient of the weight. `conv` describes the convolution; of its tensors only x and history are read, and y_stride
// are the strides of `grad`.
struct CausalConv3dWgradParams {
  CausalConv3dParams conv;
  const void* grad;
  void* dweight;  // [K, C, kt, kh, kw] without gaps, in the accumulation type
};

VK_DECLARE_CPU(causal_conv3d, CausalConv3dParams)
VK_DECLARE_CPU(causal_conv3d_wgrad, CausalConv3dWgradParams)

}  // namespace vidkernels
