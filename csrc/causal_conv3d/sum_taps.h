// SPDX-License-Identifier: Apache-2.0
// Parameters of summed taps: the weights of the convolutions that upsampling and a convolution behind it amount to.
#pragma once

#include "common/cpu.h"

namespace vidkernels {

// out[t, h, w] = sum over taps (i, j, k) of rows[0][t][i] * rows[1][h][j] * rows[2][w][k] * weight[i, j, k], axis after
// axis from t to w, each sum in the order of the taps, in float32 (float64 for float64), rounded once.
struct SumTapsParams {
  void* out;           // [K, C, n_t, n_h, n_w], filters side by side; dtype of weight or its accumulation type
  const void* weight;  // [K, C, kt, kh, kw], any strides
  int64_t out_stride[5], weight_stride[5];
  int64_t filters, channels;
  int64_t kernel[3], count[3];  // taps that are read and made along t, h, w
  const double* rows[3];        // [count, kernel]; null: the axis stays as it is
  double share;                 // of a blend: factor of the weight, before anything else
  double smooth;                // and what is then added to weight[c, c] at tap `smooth_tap` (-1: nowhere)
  int64_t smooth_tap;
  DType dtype, out_dtype;
};

VK_DECLARE_CPU(sum_taps, SumTapsParams)

}  // namespace vidkernels
