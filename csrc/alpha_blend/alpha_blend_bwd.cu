// SPDX-License-Identifier: Apache-2.0
// Backward of the alpha blend in two launches: gradients with one sum per block, and the sum of the blocks' sums. The
// order of every addition follows from the shape, so results are the same bits on every run.
#include "alpha_blend/alpha_blend_cuda.cuh"
#include "common/two_sum.cuh"

namespace vidkernels {
namespace {

using namespace cuda;

// d(mix) adds millions of products of either sign, a * (s - b), s the taps of a frame: rounded to float32, these would
// have more error than their sum.
struct MixTwoSum {
  TwoSum sum;

  __device__ void add_product(float a, TwoSum s, float b) {
    TwoSum difference = TwoSum::difference(s.high, b);
    difference.low += s.low;
    sum.add(difference.times(a));
  }
  __device__ void add_product(float a, float s, float b) { sum.add(TwoSum::difference(s, b).times(a)); }
  __device__ double total() const { return sum.total(); }
};
struct WideSum {
  double sum = 0;
  __device__ void add_product(double a, double s, double b) { sum += a * (s - b); }
  __device__ double total() const { return sum; }
};
template <typename T>
using MixSum = std::conditional_t<std::is_same_v<T, double>, WideSum, MixTwoSum>;

// Value v of the taps' sum, times tap_scale. Sums of float32 are not rounded; of half precision one rounding to float32
// is far below that of the taps. A single tap has the coefficient 1.
template <typename T, int VEC, BlendMode kMode>
__device__ inline auto mixed(const BlendTaps<T, VEC, kMode>& taps, int v) {
  if constexpr (std::is_same_v<T, float> && forward_terms(kMode) > 1) {
    TwoSum sum;
#pragma unroll
    for (int k = 0; k < forward_terms(kMode); ++k) {
      sum.add(TwoSum::product(taps.coefficient[k], taps.values[k].value[v]));
    }
    return is_pool(kMode) ? sum.times(two_parts(tap_scale(kMode))) : sum;
  } else {
    return static_cast<accumulate_t<T>>(tap_scale(kMode)) * taps.sum(v);
  }
}

template <typename T, int VEC, BlendMode kMode>
__device__ inline void through_b(const AlphaBlendBackwardParams& p, const BlendFrames& f, const BlendCursor<T>& cursor,
                                 const FrameChunk& chunk, accumulate_t<T> beta, MixSum<T>& mix) {
  for (int64_t j = chunk.out_first; j < chunk.out_last; ++j) {
    const int64_t at = cursor.y + j * p.forward.layout.frame_stride[kBlendY];
    const Pack<T, VEC> dy = load_pack<VEC>(static_cast<const T*>(p.dy) + at);
    if (p.db != nullptr) {
      Pack<T, VEC> db;
#pragma unroll
      for (int v = 0; v < VEC; ++v) db.value[v] = narrow<T>(beta * widen(dy.value[v]));
      store_pack(static_cast<T*>(p.db) + at, db);
    }
    if (p.dmix != nullptr) {
      const Pack<T, VEC> b = load_pack<VEC>(static_cast<const T*>(p.forward.b) + at);
      const BlendTaps<T, VEC, kMode> taps = load_taps<T, VEC, kMode>(p.forward, f, cursor, j);
#pragma unroll
      for (int v = 0; v < VEC; ++v) mix.add_product(widen(dy.value[v]), mixed(taps, v), widen(b.value[v]));
    }
  }
}

// Gradient of `count` frames from number `first` on, written to `to` (frame 0 of the operand).
template <typename T, int VEC, BlendMode kMode>
__device__ inline void through_x(const AlphaBlendBackwardParams& p, const BlendFrames& f, int64_t dy_offset, T* to,
                                 int64_t frame_stride, int64_t first, int64_t count, int64_t frame_of_to,
                                 accumulate_t<T> factor) {
  using A = accumulate_t<T>;
  for (int64_t i = first; i < first + count; ++i) {
    constexpr int kTerms = backward_terms(kMode);
    Pack<T, VEC> dy[kTerms] = {};
    A coefficient[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const Tap tap = backward_tap(f, i, k);
      coefficient[k] = static_cast<A>(tap.coefficient);
      const int64_t at = dy_offset + tap.frame * p.forward.layout.frame_stride[kBlendY];
      if (tap.coefficient != 0) dy[k] = load_pack<VEC>(static_cast<const T*>(p.dy) + at);
    }
    Pack<T, VEC> dx;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      A sum = 0;
#pragma unroll
      for (int k = 0; k < kTerms; ++k) sum += coefficient[k] * widen(dy[k].value[v]);
      dx.value[v] = narrow<T>(factor * sum);
    }
    store_pack(to + (i - frame_of_to) * frame_stride, dx);
  }
}

__device__ inline double block_sum(double value) {
  __shared__ double warps[kBlendThreads / 32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kBlendThreads / 32; ++i) total += warps[i];
  return total;
}

template <typename T, int VEC, BlendMode kMode>
__global__ void __launch_bounds__(kBlendThreads) alpha_blend_bwd_kernel(const AlphaBlendBackwardParams p) {
  using A = accumulate_t<T>;
  const BlendLayout& layout = p.forward.layout;
  const int64_t per_outer = layout.inner / VEC;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kBlendThreads + threadIdx.x;
  const int64_t outer = layout.dims == 0 ? 0 : unit / per_outer;
  const int64_t inner = (unit - outer * per_outer) * VEC;
  MixSum<T> mix;
  if (inner < layout.inner && outer < layout.outer()) {
    const BlendWeights<A> weights = blend_weights<A>(p.forward.mix_factor, p.forward.mix_dtype);
    const BlendFrames f = specialised<kMode>(p.forward.frames);
    const BlendCursor<T> cursor = blend_cursor<T>(p.forward, outer, inner);
    const FrameChunk chunk = frame_chunk<kMode>(f, blockIdx.y);
    through_b<T, VEC, kMode>(p, f, cursor, chunk, weights.beta, mix);
    const A factor = weights.alpha * static_cast<A>(tap_scale(kMode));
    const auto gradient = [&](void* to, BlendOperand operand, int64_t first, int64_t count, int64_t frame_of_to) {
      if (to == nullptr) return;
      T* at = static_cast<T*>(to) + layout.offset(operand, outer) + inner;
      through_x<T, VEC, kMode>(p, f, cursor.y, at, layout.frame_stride[operand], first, count, frame_of_to, factor);
    };
    gradient(p.dx, kBlendDx, chunk.first, chunk.last - chunk.first, 0);
    if (blockIdx.y == 0) gradient(p.dhistory, kBlendDhistory, -f.history, f.history, -f.history);
    if (blockIdx.y == gridDim.y - 1) gradient(p.dlookahead, kBlendDlookahead, f.frames, f.lookahead, f.frames);
  }
  if (p.dmix == nullptr) return;
  const double total = block_sum(mix.total());
  if (threadIdx.x == 0) p.partial[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

__global__ void __launch_bounds__(kBlendThreads) alpha_blend_mix_kernel(const AlphaBlendBackwardParams p) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.blocks; i += kBlendThreads) sum += p.partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x != 0) return;
  const BlendWeights<double> weights = blend_weights<double>(p.forward.mix_factor, p.forward.mix_dtype);
  store_rounded(p.dmix, p.forward.mix_dtype, 0, total * weights.alpha * weights.beta);
}

template <typename T, int VEC>
void launch(const AlphaBlendBackwardParams& p, cudaStream_t stream) {
  const int64_t units = p.forward.layout.inner / VEC * p.forward.layout.outer();
  const dim3 grid(static_cast<unsigned>((units + kBlendThreads - 1) / kBlendThreads),
                  static_cast<unsigned>(chunk_count(p.forward.frames)));
  for_mode(p.forward.frames.mode, [&](auto mode) {
    VK_LAUNCH((alpha_blend_bwd_kernel<T, VEC, decltype(mode)::value>), grid, kBlendThreads, 0, stream)(p);
  });
  VK_CUDA_CHECK_LAUNCH();
  if (p.dmix == nullptr) return;
  AlphaBlendBackwardParams last = p;
  last.blocks = static_cast<int64_t>(grid.x) * grid.y;
  VK_LAUNCH((alpha_blend_mix_kernel), 1, kBlendThreads, 0, stream)(last);
}

template <typename T>
void launch_widest(const AlphaBlendBackwardParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const void* pointers[] = {p.forward.x, p.forward.b, p.forward.history, p.forward.lookahead, p.dy,
                            p.dx,        p.db,        p.dhistory,        p.dlookahead};
  if (vectors_fit(p.forward.layout, kVec, pointers, 9, 16)) {
    launch<T, kVec>(p, stream);
  } else {
    launch<T, 1>(p, stream);
  }
}

}  // namespace

int64_t alpha_blend_bwd_blocks(const AlphaBlendBackwardParams& p) {
  const int64_t units = p.forward.layout.inner * p.forward.layout.outer();
  return (units + kBlendThreads - 1) / kBlendThreads * chunk_count(p.forward.frames);
}

void alpha_blend_bwd_cuda(const AlphaBlendBackwardParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.forward.dtype, [&] { launch_widest<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
