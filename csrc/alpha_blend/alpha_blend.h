// SPDX-License-Identifier: Apache-2.0
// Parameters and maths of the alpha blend kernels, forward and backward:
//
//   y[j] = sigmoid(m) * S(x)[j] + sigmoid(-m) * b[j]         over frames j, position by position
//   S(x)[j] = scale * sum over taps of coefficient * frame   (plain: x itself; pool: 3 frames, stride 2; up: doubling)
//
// Both directions are short sums over frames: `forward_taps(j)` lists the frames of x that make output j, and
// `backward_taps(i)` the output frames whose gradients make dx[i]. The CPU and the CUDA kernels walk these same lists.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/frame_layout.h"

namespace vidkernels {

enum class BlendMode : int32_t {
  plain = 0,
  pool_zeros = 1,      // a zero frame in front
  pool_replicate = 2,  // a copy of the first frame in front
  pool_noncausal = 3,  // a zero frame behind
  pool_history = 4,    // 1 or 2 given frames in front
  nearest = 5,
  linear = 6,
};

// Frames are numbered from 0 in x; history frames are -history .. -1, the frame behind x is number `frames`.
struct BlendFrames {
  BlendMode mode = BlendMode::plain;
  int64_t frames = 1, out_frames = 1;
  int64_t history = 0;    // given frames in front
  int64_t lookahead = 0;  // given frames behind
  int64_t split = 0;      // linear: the first `split` frames are interpolated apart; 0: all together
};

struct Taps {
  int count = 0;
  int64_t frame[4];
  float coefficient[4];  // 1, 2, 1/4, 3/4: exact

  VK_HOST_DEVICE void add(int64_t at, float value) {
    if (count > 0 && frame[count - 1] == at) {
      coefficient[count - 1] += value;
      return;
    }
    frame[count] = at;
    coefficient[count] = value;
    ++count;
  }
};

VK_HOST_DEVICE bool is_pool(BlendMode mode) { return mode >= BlendMode::pool_zeros && mode <= BlendMode::pool_history; }

// Frames in front of x that the windows of the pool start with, given or not.
VK_HOST_DEVICE int64_t pool_offset(const BlendFrames& f) {
  if (f.mode == BlendMode::pool_noncausal) return 0;
  return f.mode == BlendMode::pool_history ? f.history : 1;
}

// Whether linear interpolation blends frame i with frame i + 1.
VK_HOST_DEVICE bool linked(const BlendFrames& f, int64_t i) {
  if (i == -1) return f.history > 0;
  if (f.split > 0 && i == f.split - 1) return false;
  return i < f.frames - 1 || f.lookahead > 0;
}

VK_HOST_DEVICE int64_t out_frames_of(const BlendFrames& f) {
  if (f.mode == BlendMode::plain) return f.frames;
  if (!is_pool(f.mode)) return 2 * f.frames;
  if (f.frames == 0) return 0;
  const int64_t padded = f.frames + (f.mode == BlendMode::pool_noncausal ? 1 : pool_offset(f));
  return (padded - 1) / 2;
}

VK_HOST_DEVICE Taps forward_taps(const BlendFrames& f, int64_t j) {
  Taps taps;
  if (f.mode == BlendMode::plain || f.mode == BlendMode::nearest) {
    taps.add(f.mode == BlendMode::plain ? j : j / 2, 1.0f);
  } else if (f.mode == BlendMode::linear) {
    const int64_t i = j / 2, neighbour = j % 2 == 0 ? i - 1 : i + 1;
    if (linked(f, neighbour < i ? neighbour : i)) {
      taps.add(i, 0.75f);
      taps.add(neighbour, 0.25f);
    } else {
      taps.add(i, 1.0f);
    }
  } else {
    for (int64_t i = 2 * j - pool_offset(f); i <= 2 * j - pool_offset(f) + 2; ++i) {
      if (i < 0 && f.mode == BlendMode::pool_zeros) continue;
      if (i >= f.frames) continue;  // the zero frame behind
      taps.add(i < 0 && f.mode == BlendMode::pool_replicate ? 0 : i, 1.0f);
    }
  }
  return taps;
}

// Adds the windows of the pool that hold the frame at `position`, counted from the first frame in front.
VK_HOST_DEVICE void add_windows(const BlendFrames& f, int64_t position, Taps& taps) {
  const int64_t first = position % 2 == 0 ? position / 2 - 1 : position / 2;
  for (int64_t j = first < 0 ? 0 : first; j <= position / 2 && j < f.out_frames; ++j) taps.add(j, 1.0f);
}

VK_HOST_DEVICE Taps backward_taps(const BlendFrames& f, int64_t i) {
  Taps taps;
  if (f.mode == BlendMode::plain) {
    taps.add(i, 1.0f);
  } else if (is_pool(f.mode)) {
    if (i == 0 && f.mode == BlendMode::pool_replicate) add_windows(f, 0, taps);
    add_windows(f, i + pool_offset(f), taps);
  } else if (f.mode == BlendMode::nearest) {
    taps.add(2 * i, 1.0f);
    taps.add(2 * i + 1, 1.0f);
  } else {
    const bool inside = i >= 0 && i < f.frames;
    if (i > 0 && linked(f, i - 1)) taps.add(2 * i - 1, 0.25f);
    if (inside) {
      taps.add(2 * i, linked(f, i - 1) ? 0.75f : 1.0f);
      taps.add(2 * i + 1, linked(f, i) ? 0.75f : 1.0f);
    }
    if (i < f.frames - 1 && linked(f, i)) taps.add(2 * i + 2, 0.25f);
  }
  return taps;
}

// The pool's 1/3 is kept out of the coefficients, which stay exact.
VK_HOST_DEVICE double tap_scale(BlendMode mode) { return is_pool(mode) ? 1.0 / 3.0 : 1.0; }

// Operands in the order of FrameLayout's strides; b, dy and db have the strides of y.
enum BlendOperand { kBlendX = 0, kBlendY, kBlendHistory, kBlendLookahead, kBlendDx, kBlendDhistory, kBlendDlookahead };
constexpr int kBlendOperands = 7;
using BlendLayout = FrameLayout<kBlendOperands>;

struct AlphaBlendParams {
  const void* x = nullptr;
  const void* b = nullptr;
  const void* history = nullptr;
  const void* lookahead = nullptr;
  const void* mix_factor = nullptr;
  void* y = nullptr;
  BlendFrames frames;
  BlendLayout layout;
  DType dtype = DType::float32, mix_dtype = DType::float32;
};

struct AlphaBlendBackwardParams {
  AlphaBlendParams forward;  // y is unused
  const void* dy = nullptr;
  void* dx = nullptr;  // null where not wanted, like all gradients
  void* db = nullptr;
  void* dhistory = nullptr;
  void* dlookahead = nullptr;
  void* dmix = nullptr;
  double* partial = nullptr;  // CUDA: one sum of dy * (S(x) - b) per block
  int64_t blocks = 0;
};

VK_DECLARE_CPU(alpha_blend_fwd, AlphaBlendParams)
VK_DECLARE_CPU(alpha_blend_bwd, AlphaBlendBackwardParams)

}  // namespace vidkernels
