// SPDX-License-Identifier: Apache-2.0
// How convolutions by AMX's tiles see a frame: pixels with their border, rows end to end, one plane for each residue of
// the stride, so that every tap reads what lies a fixed distance away. Where channels are few, a pixel holds what all
// taps in space read instead, side by side, and there is one tap.
#pragma once

#include "causal_conv3d/matrix.h"
#include "causal_conv3d/source.h"
#include "common/amx.h"

#if defined(__AVX512BF16__) && defined(VK_CPU_HAS_AMX)

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr int64_t kTileTerms = 2 * kTileRows;  // depth of one product: 32 values of bfloat16

// One axis in space. Tap k of result y reads index (y + shift(k)) * stride + residue(k).
struct TileAxis {
  int64_t taps, stride, dilation, before;

  int64_t at(int64_t tap) const { return tap * dilation - before; }
  int64_t residue(int64_t tap) const { return (at(tap) % stride + stride) % stride; }
  int64_t shift(int64_t tap) const { return (at(tap) - residue(tap)) / stride; }
  int64_t low() const { return std::min(shift(0), shift(taps - 1)); }
  int64_t border() const { return std::max(shift(0), shift(taps - 1)) - low(); }
  int64_t planes() const { return std::min(stride, taps); }
  // The first tap of the same residue tells the plane: it is one of the first `stride`.
  int64_t plane(int64_t tap) const {
    int64_t first = 0;
    while (residue(first) != residue(tap)) ++first;
    return first;
  }
};

// Whether channels alone would leave more than an eighth of the products' depth empty.
inline bool merges_taps(const CausalConv3dParams& p) {
  const int64_t area = p.kernel[1] * p.kernel[2];
  return 8 * area * round_up(p.channels, kTileTerms) > 9 * round_up(area * p.channels, kTileTerms);
}

inline TileAxis tile_axis(const CausalConv3dParams& p, int axis) {
  return {merges_taps(p) ? 1 : p.kernel[axis], p.stride[axis], p.dilation[axis], p.before[axis]};
}

// What all taps in space of result (y, x) read. Up to 31 elements beyond the last are written.
inline void gather_pixel(const CausalConv3dParams& p, const Frame<bfloat16>& frame, int64_t y, int64_t x,
                         bfloat16* to) {
  const int64_t taps = p.kernel[2], h = y * p.stride[1] - p.before[1], w = x * p.stride[2] - p.before[2];
  const bool together = frame.column == p.channels && p.dilation[2] == 1;  // in memory
  const bool inside = together && w >= 0 && w + taps <= p.in_size[2];
  for (int64_t i = 0; i < p.kernel[1]; ++i) {
    const int64_t row = h + i * p.dilation[1];
    if (inside && row >= 0 && row < p.in_size[1]) {
      copy_values(frame.data + row * frame.row + w * frame.column, taps * p.channels, to);
      to += taps * p.channels;
      continue;
    }
    for (int64_t j = 0; j < taps; ++j, to += p.channels) {
      copy_values(pixel_at(p, frame, row, w + j * p.dilation[2]), p.channels, to);
    }
  }
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels

#endif
