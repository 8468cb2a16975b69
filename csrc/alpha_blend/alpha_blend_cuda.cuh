// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the alpha blend share: one thread owns VEC adjacent inner positions (16 bytes where memory
// allows) and walks a few frames of them, so neighbouring frames come from the L1 cache the second and third time.
#pragma once

#include "alpha_blend/alpha_blend.h"
#include "common/cuda.h"

namespace vidkernels {
namespace cuda {

constexpr int kBlendThreads = 256;
// Frames of x a thread walks. More would save re-reads at the chunk's ends (1 frame in 8), fewer give more threads.
constexpr int64_t kBlendChunk = 8;
// Vectors a thread moves where frames do not matter: enough loads in flight to fill the memory pipe.
constexpr int kPlainVectors = 4;

// Which frames chunk number `index` covers: of x [first, last), of y [out_first, out_last).
struct FrameChunk {
  int64_t first, last, out_first, out_last;
};

__host__ __device__ inline int64_t chunk_count(const BlendFrames& f) {
  const int64_t count = (f.frames + kBlendChunk - 1) / kBlendChunk;
  return count > 0 ? count : 1;
}

template <BlendMode kMode>
__device__ inline FrameChunk frame_chunk(const BlendFrames& f, int64_t index) {
  FrameChunk chunk;
  chunk.first = index * kBlendChunk;
  const bool is_last = index + 1 == chunk_count(f);
  chunk.last = is_last ? f.frames : chunk.first + kBlendChunk;
  chunk.out_first = is_pool(kMode) ? chunk.first / 2 : kMode == BlendMode::plain ? chunk.first : 2 * chunk.first;
  chunk.out_last = is_last                     ? f.out_frames
                   : is_pool(kMode)            ? chunk.last / 2
                   : kMode == BlendMode::plain ? chunk.last
                                               : 2 * chunk.last;
  return chunk;
}

// alpha and beta = 1 - alpha, without cancellation on either side.
template <typename A>
struct BlendWeights {
  A alpha, beta;
};
template <typename A>
__device__ inline BlendWeights<A> blend_weights(const void* mix_factor, DType dtype) {
  A m = 0;
  switch (dtype) {
    case DType::float32:
      m = static_cast<A>(*static_cast<const float*>(mix_factor));
      break;
    case DType::float64:
      m = static_cast<A>(*static_cast<const double*>(mix_factor));
      break;
    case DType::bfloat16:
      m = widen(*static_cast<const __nv_bfloat16*>(mix_factor));
      break;
    default:
      m = widen(*static_cast<const __half*>(mix_factor));
      break;
  }
  const A e = exp(m < 0 ? m : -m);
  const A large = A(1) / (A(1) + e), small = e / (A(1) + e);
  return m < 0 ? BlendWeights<A>{small, large} : BlendWeights<A>{large, small};
}

// Pointers to a thread's vector in every operand, at frame 0.
template <typename T>
struct BlendCursor {
  const T *x, *history, *lookahead;
  int64_t y;  // offset in y, b, dy and db
  int64_t outer;
  int64_t inner;
};

template <typename T>
__device__ inline BlendCursor<T> blend_cursor(const AlphaBlendParams& p, int64_t outer, int64_t inner) {
  const auto at = [&](BlendOperand operand) { return p.layout.offset(operand, outer) + inner; };
  return {static_cast<const T*>(p.x) + at(kBlendX),
          p.history == nullptr ? nullptr : static_cast<const T*>(p.history) + at(kBlendHistory),
          p.lookahead == nullptr ? nullptr : static_cast<const T*>(p.lookahead) + at(kBlendLookahead),
          at(kBlendY),
          outer,
          inner};
}

// The vector of frame i: of x, of the history (i < 0) or of the lookahead (i == frames).
template <typename T, int VEC>
__device__ inline Pack<T, VEC> load_frame(const AlphaBlendParams& p, const BlendCursor<T>& cursor, int64_t i) {
  const T* from = cursor.x + i * p.layout.frame_stride[kBlendX];
  if (i < 0) from = cursor.history + (i + p.frames.history) * p.layout.frame_stride[kBlendHistory];
  if (i >= p.frames.frames) from = cursor.lookahead + (i - p.frames.frames) * p.layout.frame_stride[kBlendLookahead];
  return load_pack<VEC>(from);
}

// The terms of an output frame, with their coefficients.
template <typename T, int VEC, BlendMode kMode>
struct BlendTaps {
  Pack<T, VEC> values[forward_terms(kMode)] = {};
  accumulate_t<T> coefficient[forward_terms(kMode)];

  // Value v, not yet times tap_scale.
  __device__ accumulate_t<T> sum(int v) const {
    accumulate_t<T> total = 0;
#pragma unroll
    for (int k = 0; k < forward_terms(kMode); ++k) total += coefficient[k] * widen(values[k].value[v]);
    return total;
  }
};

// Those of output frame j: all loads before the first use of one.
template <typename T, int VEC, BlendMode kMode>
__device__ inline BlendTaps<T, VEC, kMode> load_taps(const AlphaBlendParams& p, const BlendFrames& f,
                                                     const BlendCursor<T>& cursor, int64_t j) {
  BlendTaps<T, VEC, kMode> taps;
#pragma unroll
  for (int k = 0; k < forward_terms(kMode); ++k) {
    const Tap tap = forward_tap(f, j, k);
    taps.coefficient[k] = static_cast<accumulate_t<T>>(tap.coefficient);
    if (tap.coefficient != 0) taps.values[k] = load_frame<T, VEC>(p, cursor, tap.frame);
  }
  return taps;
}

// Frames with the mode known at compile time, so that the branches on it vanish. The pools share one instance.
template <BlendMode kMode>
__device__ inline BlendFrames specialised(const BlendFrames& frames) {
  BlendFrames f = frames;
  if (!is_pool(kMode)) f.mode = kMode;
  return f;
}

// Whether vectors of VEC elements are aligned wherever a kernel goes.
inline bool vectors_fit(const BlendLayout& layout, int64_t vec, const void* const* pointers, int count, size_t bytes) {
  bool fits = layout.inner % vec == 0;
  for (int k = 0; k < kBlendOperands && fits; ++k) {
    fits = layout.frame_stride[k] % vec == 0;
    for (int i = 0; i < layout.dims; ++i) fits = fits && layout.stride[k][i] % vec == 0;
  }
  for (int i = 0; i < count; ++i) fits = fits && aligned(pointers[i], bytes);
  return fits;
}

// Runs `launch<kMode>()` for the family of a mode.
template <typename F>
inline void for_mode(BlendMode mode, const F& launch) {
  switch (mode) {
    case BlendMode::plain:
      return launch(std::integral_constant<BlendMode, BlendMode::plain>{});
    case BlendMode::nearest:
      return launch(std::integral_constant<BlendMode, BlendMode::nearest>{});
    case BlendMode::linear:
      return launch(std::integral_constant<BlendMode, BlendMode::linear>{});
    default:
      return launch(std::integral_constant<BlendMode, BlendMode::pool_zeros>{});
  }
}

}  // namespace cuda
}  // namespace vidkernels
