// SPDX-License-Identifier: Apache-2.0
// Parameters and maths of the alpha blend kernels, forward and backward:
//
//   y[j] = sigmoid(m) * S(x)[j] + sigmoid(-m) * b[j]         over frames j, position by position
//   S(x)[j] = scale * sum over taps of coefficient * frame   (plain: x itself; pool: 3 frames, stride 2; up: doubling)
//
// Both directions are short sums over frames: `forward_tap(j, k)` is the k-th frame of x that makes output j, and
// `backward_tap(i, k)` the k-th output frame whose gradient makes dx[i]. The CPU and the CUDA kernels share them.
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

// One term of such a sum; coefficient 0 (1, 2, 1/4 and 3/4, all exact, otherwise) means none.
struct Tap {
  int64_t frame;
  float coefficient;
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

// Most terms of a sum, to unroll by.
VK_HOST_DEVICE constexpr int forward_terms(BlendMode mode) {
  return mode == BlendMode::linear ? 2 : mode == BlendMode::plain || mode == BlendMode::nearest ? 1 : 3;
}
VK_HOST_DEVICE constexpr int backward_terms(BlendMode mode) {
  return mode == BlendMode::linear ? 4 : mode == BlendMode::plain ? 1 : 2;
}

VK_HOST_DEVICE Tap forward_tap(const BlendFrames& f, int64_t j, int k) {
  if (f.mode == BlendMode::plain) return {j, 1.0f};
  if (f.mode == BlendMode::nearest) return {j / 2, 1.0f};
  if (f.mode == BlendMode::linear) {
    const int64_t i = j / 2, neighbour = j % 2 == 0 ? i - 1 : i + 1;
    const bool blends = linked(f, neighbour < i ? neighbour : i);
    if (k == 0) return {i, blends ? 0.75f : 1.0f};
    return {neighbour, blends ? 0.25f : 0.0f};
  }
  const int64_t i = 2 * j - pool_offset(f) + k;
  if (i < 0 && f.mode == BlendMode::pool_replicate) return {0, 1.0f};
  const bool zero = i >= f.frames || (i < 0 && f.mode == BlendMode::pool_zeros);
  return {i, zero ? 0.0f : 1.0f};
}

// The windows of the pool that hold a frame: one or two.
VK_HOST_DEVICE Tap backward_pool_tap(const BlendFrames& f, int64_t i, int k) {
  const int64_t position = i + pool_offset(f);
  const int64_t j = position % 2 == 0 ? position / 2 - 1 + k : position / 2 + k;
  if (j < 0 || 2 * j > position || j >= f.out_frames) return {0, 0.0f};
  return {j, f.mode == BlendMode::pool_replicate && i == 0 ? 2.0f : 1.0f};
}

VK_HOST_DEVICE Tap backward_tap(const BlendFrames& f, int64_t i, int k) {
  if (f.mode == BlendMode::plain) return {i, 1.0f};
  if (f.mode == BlendMode::nearest) return {2 * i + k, 1.0f};
  if (f.mode != BlendMode::linear) return backward_pool_tap(f, i, k);
  const bool inside = i >= 0 && i < f.frames;
  const bool before = i > 0 && linked(f, i - 1), behind = i < f.frames - 1 && linked(f, i);
  switch (k) {
    case 0:
      return {2 * i - 1, before ? 0.25f : 0.0f};
    case 1:
      return {2 * i, !inside ? 0.0f : linked(f, i - 1) ? 0.75f : 1.0f};
    case 2:
      return {2 * i + 1, !inside ? 0.0f : linked(f, i) ? 0.75f : 1.0f};
    default:
      return {2 * i + 2, behind ? 0.25f : 0.0f};
  }
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
