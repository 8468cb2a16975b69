// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "channel_norm/channel_norm_cuda.cuh"
#include "channel_norm/channel_norm_planes.cuh"

namespace vidkernels {
namespace {

using namespace cuda;

// Weight and bias of more channels than this are read from global memory.
constexpr int64_t kMaxStaged = 2048;

// Rows a group of lanes works through. Short rows of whole float32 vectors: as many as make 64 bytes a thread, all on
// their way before weight and bias are looked at, and the block ends. Blocks then sweep memory in order, and many
// threads hide what one of them waits for (H100, 128 channels: 459 us, where blocks of 8 rows one by one took 482).
// Other rows: one by one, 8 of them, which pays for staging weight and bias: 16-bit ones took 280 us in the first way
// and 255 in this.
template <int VEC, int ITERS>
struct RowsOfGroup {
  static constexpr bool kOnce = VEC > 1 && VEC <= 4 && ITERS >= 1 && ITERS <= 4;
  static constexpr int kHeld = kOnce ? 4 / ITERS : 1;
  static constexpr int kMostPasses = kOnce ? 1 : 8;
};

// Blocks of a multiprocessor, by the registers that a thread's vectors take: left alone the compiler takes 125 for 4.
template <int VEC, int ITERS>
constexpr int rows_blocks() {
  if (ITERS == 8) return 2;
  if (ITERS == 4) return VEC == 4 ? 5 : 3;
  return 4;
}

template <typename T, int VEC, int ITERS>
__global__ void __launch_bounds__(kNormThreads, (rows_blocks<VEC, ITERS>()))
    channel_norm_rows_fwd_kernel(const __grid_constant__ ChannelNormParams p, int lanes, int passes) {
  using A = accumulate_t<T>;
  using Rows = RowsOfGroup<VEC, ITERS>;
  VK_DYNAMIC_SHARED(A, shared);
  const int64_t channels = p.layout.channels, vectors = channels / VEC;
  const bool is_staged = channels <= kMaxStaged;
  const StagedAffine<A, VEC> affine{shared, channels};
  const int lane = threadIdx.x % lanes, groups = kNormThreads / lanes;
  const int64_t rows_of_group = Rows::kOnce ? Rows::kHeld : passes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups * rows_of_group + threadIdx.x / lanes;
  const int64_t rows = p.layout.positions();
  const NormConstants<A> constants(p);
  const auto stage = [&] {
    if (!is_staged) return;
    affine.fill(p.weight, p.bias);
    __syncthreads();
  };
  if (!Rows::kOnce) stage();
#pragma unroll 1
  for (int pass = 0; pass < (Rows::kOnce ? 1 : passes); ++pass) {
    HeldRow<T, VEC, ITERS> held[Rows::kHeld];
    const T* x[Rows::kHeld];
    T* y[Rows::kHeld];
    bool active[Rows::kHeld];
#pragma unroll
    for (int r = 0; r < Rows::kHeld; ++r) {
      const int64_t row = first + static_cast<int64_t>(pass * Rows::kHeld + r) * groups;
      active[r] = row < rows;
      const PositionOffsets at = position_offsets(p.layout, p.layout.dims, active[r] ? row : 0);
      x[r] = static_cast<const T*>(p.x) + at.x;
      y[r] = static_cast<T*>(p.y) + at.y;
      if (active[r]) held[r].load(x[r], lane, lanes, vectors);
    }
    if (Rows::kOnce) stage();
#pragma unroll
    for (int r = 0; r < Rows::kHeld; ++r) {
      const RowStatistics<A> s =
          row_statistics<T, VEC, ITERS>(held[r], x[r], lane, lanes, vectors, active[r], p, constants);
      const auto finish = [&](const Pack<T, VEC>& pack, int64_t vector, int) {
        A w[VEC], b[VEC], z[VEC];
        if (is_staged) {
          affine.read(vector, w, b);
        } else {
          affine_values<A, VEC>(p.weight, vector * VEC, A(1), w);
          affine_values<A, VEC>(p.bias, vector * VEC, A(0), b);
        }
#pragma unroll
        for (int v = 0; v < VEC; ++v) z[v] = (widen(pack.value[v]) - s.mean) * s.rstd * w[v] + b[v];
        if (p.silu) {  // one branch for all values, which are then computed side by side
#pragma unroll
          for (int v = 0; v < VEC; ++v) z[v] = silu<T>(z[v]);
        }
        Pack<T, VEC> out;
#pragma unroll
        for (int v = 0; v < VEC; ++v) out.value[v] = narrow<T>(z[v]);
        store_pack(y[r] + vector * VEC, out);
      };
      for_row<T, VEC, ITERS>(held[r], x[r], lane, lanes, vectors, active[r], finish);
    }
  }
}

// 64 registers a thread where each holds four vectors of at most four values: 1024 threads then have all their vectors
// on their way. Vectors of eight would spill.
template <typename T, int VEC, int X, int ITERS>
__global__ void __launch_bounds__(kPlaneThreads, ITERS == 4 && VEC <= 4 ? 2 : 1)
    channel_norm_planes_fwd_kernel(const ChannelNormParams p) {
  using A = accumulate_t<T>;
  VK_DYNAMIC_SHARED(A, scratch);
  PlaneTile<T, VEC, X, ITERS> tile(p, scratch);
  tile.locate(blockIdx.x);
  tile.load();
  tile.stage();
  tile.statistics();
  tile.for_channels([&](const Pack<T, VEC>& pack, int64_t c, int) {
    A w, b, z[VEC];
    tile.affine(c, w, b);
#pragma unroll
    for (int v = 0; v < VEC; ++v) z[v] = (widen(pack.value[v]) - tile.mean[v]) * tile.rstd[v] * w + b;
    if (p.silu) {  // one branch for all values, which are then computed side by side
#pragma unroll
      for (int v = 0; v < VEC; ++v) z[v] = silu<T>(z[v]);
    }
    Pack<T, VEC> out;
#pragma unroll
    for (int v = 0; v < VEC; ++v) out.value[v] = narrow<T>(z[v]);
    store_pack(static_cast<T*>(p.y) + tile.y_offset + c * p.layout.y_channel, out);
  });
}

template <typename T, int VEC, int ITERS>
void launch_rows(const ChannelNormParams& p, int lanes, cudaStream_t stream) {
  // Groups of small tensors take fewer rows, so that every multiprocessor gets blocks: with 8 rows a group, 5120 rows
  // of 512 channels in bfloat16 made 40 blocks for 132 multiprocessors, and took 20 us for 10 MB (H200).
  const int64_t per_pass = static_cast<int64_t>(kNormThreads / lanes) * RowsOfGroup<VEC, ITERS>::kHeld;
  const int64_t at_once = per_pass * multiprocessors() * rows_blocks<VEC, ITERS>(), rows = p.layout.positions();
  const int64_t spread = (rows + at_once - 1) / at_once;
  const int passes = static_cast<int>(std::clamp<int64_t>(spread, 1, RowsOfGroup<VEC, ITERS>::kMostPasses));
  const dim3 grid(static_cast<unsigned>((rows + per_pass * passes - 1) / (per_pass * passes)));
  const bool is_staged = p.layout.channels <= kMaxStaged;
  const size_t shared = is_staged ? StagedAffine<accumulate_t<T>, VEC>::bytes(p.layout.channels) : 0;
  VK_LAUNCH((channel_norm_rows_fwd_kernel<T, VEC, ITERS>), grid, kNormThreads, shared, stream)(p, lanes, passes);
}

template <typename T, int VEC>
void dispatch_rows(const ChannelNormParams& p, cudaStream_t stream) {
  constexpr int kChoices[] = {1, 2, 3, 4, 8};
  const RowShape shape = row_shape(p.layout.channels / VEC, kChoices, 5, VEC > 1 ? 8 : 32);
  switch (shape.iters) {
    case 1:
      return launch_rows<T, VEC, 1>(p, shape.lanes, stream);
    case 2:
      return launch_rows<T, VEC, 2>(p, shape.lanes, stream);
    case 3:
      return launch_rows<T, VEC, 3>(p, shape.lanes, stream);
    case 4:
      return launch_rows<T, VEC, 4>(p, shape.lanes, stream);
    case 8:
      return launch_rows<T, VEC, 8>(p, shape.lanes, stream);
    default:
      return launch_rows<T, VEC, 0>(p, 32, stream);
  }
}

template <typename T, int VEC, int X, int ITERS>
void launch_planes(const ChannelNormParams& p, int columns, cudaStream_t stream) {
  const int64_t tiles = plane_tiles<VEC, X>(p.layout);
  const size_t shared = plane_shared_bytes<accumulate_t<T>, VEC, X, ITERS>(columns, p.layout.channels);
  const dim3 block(X, static_cast<unsigned>(columns));
  VK_LAUNCH((channel_norm_planes_fwd_kernel<T, VEC, X, ITERS>), static_cast<unsigned>(tiles), block, shared, stream)(p);
}

template <typename T, int VEC, int X>
void dispatch_planes(const ChannelNormParams& p, cudaStream_t stream) {
  // 16 vectors of 8 values, with their statistics, would not fit into 128 registers
  const PlaneShape shape = plane_shape<X>(p.layout.channels, VEC < 8 ? 16 : 8);
  switch (shape.iters) {
    case 4:
      return launch_planes<T, VEC, X, 4>(p, shape.columns, stream);
    case 8:
      return launch_planes<T, VEC, X, 8>(p, shape.columns, stream);
    case 16:
      if constexpr (VEC < 8) launch_planes<T, VEC, X, 16>(p, shape.columns, stream);
      return;
    default:
      return launch_planes<T, VEC, X, 0>(p, shape.columns, stream);
  }
}

template <typename T>
void launch(const ChannelNormParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool wide = aligned16(p.x) && aligned16(p.y) && norm_vectors_fit(p.layout, kVec);
  if (p.layout.rows) {
    wide ? dispatch_rows<T, kVec>(p, stream) : dispatch_rows<T, 1>(p, stream);
  } else {
    wide ? dispatch_planes<T, kVec, 8>(p, stream) : dispatch_planes<T, 1, 32>(p, stream);
  }
}

}  // namespace

void channel_norm_fwd_cuda(const ChannelNormParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
