// SPDX-License-Identifier: Apache-2.0
// Parameters of the CUDA convolution: 3x3 taps in space, stride and dilation 1, products of 16-bit values.
#pragma once

#include "causal_conv3d/causal_conv3d.h"

namespace vidkernels {

// A program makes a box of `block_rows` x `block_columns` blocks, each of 8 x 8 positions of a frame, for one tile of
// filters. Its box of the source has a border of one position around.
struct CausalConv3dBoxParams {
  CausalConv3dParams conv;  // `weight` in any strides; channels and what separates positions are multiples of 8
  void* packed;             // room for `packed_bytes`
  int64_t tile_filters;     // 96, 128, 160 or 192; divides the filters
  int64_t block_rows, block_columns;  // `tile_blocks` of them
  int64_t group;                      // rows of boxes that pass through all frames before the next do
};

// Blocks of a program: as many as leave 192 sums a thread or fewer; 0 where there is no kernel.
constexpr int64_t tile_blocks(int64_t tile_filters) {
  if (tile_filters == 96) return 8;
  if (tile_filters == 128) return 6;
  return tile_filters == 160 || tile_filters == 192 ? 4 : 0;
}

constexpr int64_t kBoxChannels = 32;  // of one step

VK_HOST_DEVICE int64_t channel_steps(const CausalConv3dParams& p) {
  return (p.channels + kBoxChannels - 1) / kBoxChannels;
}

// Weights with their channels filled up, and the bias in float32.
VK_HOST_DEVICE int64_t packed_elements(const CausalConv3dParams& p) {
  return p.filters * p.kernel[0] * 9 * channel_steps(p) * kBoxChannels;
}
inline int64_t packed_bytes(const CausalConv3dParams& p) { return 2 * packed_elements(p) + 4 * p.filters; }

}  // namespace vidkernels
