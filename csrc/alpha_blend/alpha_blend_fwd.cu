// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend/alpha_blend_cuda.cuh"

namespace vidkernels {
namespace {

using namespace cuda;

// Grid x: vectors of inner positions of all outer positions; grid y: chunks of frames.
template <typename T, int VEC, BlendMode kMode>
__global__ void __launch_bounds__(kBlendThreads) alpha_blend_fwd_kernel(const AlphaBlendParams p) {
  using A = accumulate_t<T>;
  const int64_t per_outer = p.layout.inner / VEC;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kBlendThreads + threadIdx.x;
  const int64_t outer = p.layout.dims == 0 ? 0 : unit / per_outer;
  const int64_t inner = (unit - outer * per_outer) * VEC;
  if (inner >= p.layout.inner || outer >= p.layout.outer()) return;
  const BlendWeights<A> weights = blend_weights<A>(p.mix_factor, p.mix_dtype);
  const A factor = weights.alpha * static_cast<A>(tap_scale(kMode));
  const BlendFrames f = specialised<kMode>(p.frames);
  const BlendCursor<T> cursor = blend_cursor<T>(p, outer, inner);
  const FrameChunk chunk = frame_chunk<kMode>(f, blockIdx.y);
#pragma unroll 2
  for (int64_t j = chunk.out_first; j < chunk.out_last; ++j) {
    const int64_t at = cursor.y + j * p.layout.frame_stride[kBlendY];
    const Pack<T, VEC> b = load_pack<VEC>(static_cast<const T*>(p.b) + at);
    const BlendTaps<T, VEC, kMode> taps = load_taps<T, VEC, kMode>(p, f, cursor, j);
    Pack<T, VEC> y;
#pragma unroll
    for (int v = 0; v < VEC; ++v) y.value[v] = narrow<T>(factor * taps.sum(v) + weights.beta * widen(b.value[v]));
    store_pack(static_cast<T*>(p.y) + at, y);
  }
}

// Everything in one flat run: kPlainVectors loads of each operand are in flight before the first store, and before the
// mix factor, which the compiler waits for where it is read.
template <typename T, int VEC>
__global__ void __launch_bounds__(kBlendThreads) alpha_blend_flat_kernel(const AlphaBlendParams p) {
  using A = accumulate_t<T>;
  const int64_t count = p.layout.inner / VEC;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlendThreads * kPlainVectors + threadIdx.x;
  Pack<T, VEC> left[kPlainVectors], right[kPlainVectors];
#pragma unroll
  for (int i = 0; i < kPlainVectors; ++i) {
    const int64_t at = first + i * kBlendThreads;
    if (at < count) {
      left[i] = load_pack<VEC>(static_cast<const T*>(p.x) + at * VEC);
      right[i] = load_pack<VEC>(static_cast<const T*>(p.b) + at * VEC);
    }
  }
  const BlendWeights<A> weights = blend_weights<A>(p.mix_factor, p.mix_dtype);
#pragma unroll
  for (int i = 0; i < kPlainVectors; ++i) {
    const int64_t at = first + i * kBlendThreads;
    if (at >= count) break;
    Pack<T, VEC> out;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      out.value[v] = narrow<T>(weights.alpha * widen(left[i].value[v]) + weights.beta * widen(right[i].value[v]));
    }
    store_pack(static_cast<T*>(p.y) + at * VEC, out);
  }
}

template <typename T, int VEC>
void launch(const AlphaBlendParams& p, cudaStream_t stream) {
  const int64_t units = p.layout.inner / VEC * p.layout.outer();
  if (p.frames.mode == BlendMode::plain && p.layout.dims == 0) {
    const int64_t per_block = kBlendThreads * kPlainVectors;
    const dim3 grid(static_cast<unsigned>((units + per_block - 1) / per_block));
    VK_LAUNCH((alpha_blend_flat_kernel<T, VEC>), grid, kBlendThreads, 0, stream)(p);
    return;
  }
  const dim3 grid(static_cast<unsigned>((units + kBlendThreads - 1) / kBlendThreads),
                  static_cast<unsigned>(chunk_count(p.frames)));
  for_mode(p.frames.mode, [&](auto mode) {
    VK_LAUNCH((alpha_blend_fwd_kernel<T, VEC, decltype(mode)::value>), grid, kBlendThreads, 0, stream)(p);
  });
}

template <typename T>
void launch_widest(const AlphaBlendParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const void* pointers[] = {p.x, p.b, p.y, p.history, p.lookahead};
  if (vectors_fit(p.layout, kVec, pointers, 5, 16)) {
    launch<T, kVec>(p, stream);
  } else {
    launch<T, 1>(p, stream);
  }
}

}  // namespace

void alpha_blend_fwd_cuda(const AlphaBlendParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch_widest<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
