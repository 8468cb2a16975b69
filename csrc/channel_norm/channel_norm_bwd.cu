// SPDX-License-Identifier: Apache-2.0
// Backward of the channel norm: one launch for dx with sums of dweight and dbias per block, one to add those up. Blocks
// are as many as the shape says, and every sum has a fixed order: the same bits on every run.
#include "channel_norm/channel_norm_cuda.cuh"
#include "channel_norm/channel_norm_planes.cuh"

namespace vidkernels {
namespace {

using namespace cuda;

constexpr int kNormWarps = kNormThreads / 32;

// Sums over rows that one thread keeps for its vectors of the channels: in registers, or, for rows that do not fit, in
// its warp's own row of `partial`.
template <typename A, int VEC, int ITERS>
struct RowSums {
  A weight[ITERS * VEC] = {}, bias[ITERS * VEC] = {};

  __device__ RowSums(A*, int64_t, int) {}
  __device__ void add(int i, int v, int64_t, const Element<A>& e) {
    weight[i * VEC + v] += e.dz * e.xhat;
    bias[i * VEC + v] += e.dz;
  }
  // Adds up the block's threads of each channel, one warp after another, and writes [2][C].
  __device__ void finish(A* shared, A* out, int lanes, int64_t channels) {
    const int lane = threadIdx.x % lanes, warp = threadIdx.x / 32;
    __syncthreads();  // weight and bias have been read for the last time
    for (int64_t c = threadIdx.x; c < 2 * channels; c += kNormThreads) shared[c] = 0;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITERS * VEC; ++k) {
      for (int offset = 16; offset >= lanes; offset /= 2) {
        weight[k] += __shfl_xor_sync(0xffffffffu, weight[k], offset);
        bias[k] += __shfl_xor_sync(0xffffffffu, bias[k], offset);
      }
    }
    for (int w = 0; w < kNormWarps; ++w) {
      if (warp == w && threadIdx.x % 32 < lanes) {
#pragma unroll
        for (int k = 0; k < ITERS * VEC; ++k) {
          const int64_t c = (lane + static_cast<int64_t>(k / VEC) * lanes) * VEC + k % VEC;
          if (c < channels) {
            shared[c] += weight[k];
            shared[channels + c] += bias[k];
          }
        }
      }
      __syncthreads();
    }
    for (int64_t c = threadIdx.x; c < 2 * channels; c += kNormThreads) out[c] = shared[c];
  }
};
template <typename A, int VEC>
struct RowSums<A, VEC, 0> {
  A* own;
  int64_t channels;

  __device__ RowSums(A* partial, int64_t count, int lane) : channels(count) {
    own = partial + (static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / 32) * 2 * count;
    for (int64_t at = lane; at < count / VEC; at += 32) {
      for (int v = 0; v < VEC; ++v) own[at * VEC + v] = own[count + at * VEC + v] = 0;
    }
  }
  __device__ void add(int, int, int64_t c, const Element<A>& e) {
    own[c] += e.dz * e.xhat;
    own[channels + c] += e.dz;
  }
  __device__ void finish(A*, A*, int, int64_t) {}
};

template <typename T, int VEC, int ITERS>
__global__ void __launch_bounds__(kNormThreads)
    channel_norm_rows_bwd_kernel(const ChannelNormBackwardParams p, int lanes) {
  using A = accumulate_t<T>;
  VK_DYNAMIC_SHARED(A, shared);
  const ChannelNormParams& f = p.forward;
  const int64_t channels = f.layout.channels, vectors = channels / VEC, rows = f.layout.positions();
  const int lane = threadIdx.x % lanes, groups = kNormThreads / lanes;
  RowSums<A, VEC, ITERS> sums(static_cast<A*>(p.partial), channels, lane);
  const StagedAffine<A, VEC> affine{shared, channels};
  const NormConstants<A> constants(f);
  if (ITERS > 0) {
    affine.fill(f.weight, f.bias);
    __syncthreads();
  }
  const auto read_affine = [&](int64_t vector, A(&w)[VEC], A(&b)[VEC]) {
    if (ITERS > 0) return affine.read(vector, w, b);
    affine_values<A, VEC>(f.weight, vector * VEC, A(1), w);
    affine_values<A, VEC>(f.bias, vector * VEC, A(0), b);
  };
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * groups; base < rows;
       base += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t row = base + threadIdx.x / lanes;
    const bool active = row < rows;
    const PositionOffsets at = position_offsets(f.layout, f.layout.dims, active ? row : 0);
    const T* x = static_cast<const T*>(f.x) + at.x;
    const T* dy = static_cast<const T*>(p.dy) + at.y;
    HeldRow<T, VEC, ITERS> x_held, dy_held;
    if (active) {
      x_held.load(x, lane, lanes, vectors);
      dy_held.load(dy, lane, lanes, vectors);
    }
    const RowStatistics<A> s = row_statistics<T, VEC, ITERS>(x_held, x, lane, lanes, vectors, active, f, constants);
    A g_sum = 0, gx_sum = 0, x_sum = 0;
    A g_held[ITERS > 0 ? ITERS * VEC : 1];
    for_row<T, VEC, ITERS>(x_held, x, lane, lanes, vectors, active, [&](const Pack<T, VEC>& xs, int64_t at_vec, int i) {
      const Pack<T, VEC> dys = dy_held.vector(dy, i, at_vec);
      A w[VEC], b[VEC];
      read_affine(at_vec, w, b);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const Element<A> e = element<T>(widen(xs.value[v]), widen(dys.value[v]), s.mean, s.rstd, w[v], b[v], f.silu);
        const A g = e.dz * w[v];
        sums.add(i, v, at_vec * VEC + v, e);
        g_sum += g;
        gx_sum += g * e.xhat;
        x_sum += e.xhat;
        if (ITERS > 0) g_held[i * VEC + v] = g;
      }
    });
    if (p.dx == nullptr) continue;
    g_sum = group_sum(g_sum, lanes);
    gx_sum = group_sum(gx_sum, lanes);
    x_sum = group_sum(x_sum, lanes);
    const DxTerms<A> terms = dx_terms<A>(f, constants.part, g_sum, gx_sum, x_sum, s.fixed);
    T* dx = static_cast<T*>(p.dx) + at.y;
    for_row<T, VEC, ITERS>(x_held, x, lane, lanes, vectors, active, [&](const Pack<T, VEC>& xs, int64_t at_vec, int i) {
      const Pack<T, VEC> dys = dy_held.vector(dy, i, at_vec);
      Pack<T, VEC> out;
      A w[VEC], b[VEC];
      if (ITERS == 0) read_affine(at_vec, w, b);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const A xhat = (widen(xs.value[v]) - s.mean) * s.rstd;
        A g;
        if (ITERS > 0) {
          g = g_held[i * VEC + v];
        } else {
          g = w[v] * element<T>(widen(xs.value[v]), widen(dys.value[v]), s.mean, s.rstd, w[v], b[v], f.silu).dz;
        }
        out.value[v] = narrow<T>(s.rstd * (g - terms.shift - xhat * terms.gx_mean));
      }
      store_pack(dx + at_vec * VEC, out);
    });
  }
  sums.finish(shared, static_cast<A*>(p.partial) + static_cast<int64_t>(blockIdx.x) * 2 * channels, lanes, channels);
}

template <typename T, int VEC, int X, int ITERS>
__global__ void __launch_bounds__(kPlaneThreads)
    channel_norm_planes_bwd_kernel(const ChannelNormBackwardParams p, int64_t tiles) {
  using A = accumulate_t<T>;
  VK_DYNAMIC_SHARED(A, scratch);
  const ChannelNormParams& f = p.forward;
  const int64_t channels = f.layout.channels;
  const A part = A(1) / static_cast<A>(channels);
  A* out = static_cast<A*>(p.partial) + static_cast<int64_t>(blockIdx.x) * 2 * channels;
  A weight_sums[ITERS > 0 ? ITERS : 1] = {}, bias_sums[ITERS > 0 ? ITERS : 1] = {};
  // Sums over the X threads of a channel; with ITERS = 0 they go to memory after every tile.
  const auto add_up = [&](A weight, A bias, int64_t c, bool first) {
#pragma unroll
    for (int offset = X / 2; offset > 0; offset /= 2) {
      weight += __shfl_xor_sync(0xffffffffu, weight, offset);
      bias += __shfl_xor_sync(0xffffffffu, bias, offset);
    }
    if (threadIdx.x != 0 || c >= channels) return;
    out[c] = first ? weight : out[c] + weight;
    out[channels + c] = first ? bias : out[channels + c] + bias;
  };
  // dL/dxhat of what a thread holds, where registers suffice: half the exponentials, and dy is read once.
  constexpr bool kHolds = ITERS > 0 && ITERS * VEC <= 16;
  A g_held[kHolds ? ITERS : 1][VEC];
  PlaneTile<T, VEC, X, ITERS>(f, scratch).stage();
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    PlaneTile<T, VEC, X, ITERS> tile(f, scratch);
    tile.locate(index);
    tile.load();
    const auto at = [&](int64_t c) { return tile.y_offset + c * f.layout.y_channel; };
    const auto dy_at = [&](int64_t c) { return load_pack<VEC>(static_cast<const T*>(p.dy) + at(c)); };
    Pack<T, VEC> dy_held[kHolds ? ITERS : 1];
    if constexpr (kHolds) {
      tile.for_channels([&](const Pack<T, VEC>&, int64_t c, int i) { dy_held[i] = dy_at(c); });
    }
    tile.statistics();
    A sums[3][VEC] = {};  // of g, of g * xhat, of xhat
    const auto visit = [&](const Pack<T, VEC>& xs, const Pack<T, VEC>& dys, int64_t c, int i, A& weight, A& bias) {
      A w, b;
      tile.affine(c, w, b);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const Element<A> e =
            element<T>(widen(xs.value[v]), widen(dys.value[v]), tile.mean[v], tile.rstd[v], w, b, f.silu);
        weight += e.dz * e.xhat;
        bias += e.dz;
        const A g = e.dz * w;
        sums[0][v] += g;
        sums[1][v] += g * e.xhat;
        sums[2][v] += e.xhat;
        if constexpr (kHolds) g_held[i][v] = g;
      }
    };
    if constexpr (ITERS > 0) {
      tile.for_channels([&](const Pack<T, VEC>& xs, int64_t c, int i) {
        if constexpr (kHolds) {
          visit(xs, dy_held[i], c, i, weight_sums[i], bias_sums[i]);
        } else {
          visit(xs, dy_at(c), c, i, weight_sums[i], bias_sums[i]);
        }
      });
    } else {
      for (int64_t base = 0; base < channels; base += blockDim.y) {
        const int64_t c = base + threadIdx.y;
        A weight = 0, bias = 0;
        if (tile.active && c < channels) visit(tile.at_channel(c), dy_at(c), c, 0, weight, bias);
        add_up(weight, bias, c, index == blockIdx.x);
      }
    }
    if (p.dx == nullptr) continue;
    tile.total(sums);
    DxTerms<A> terms[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      terms[v] = dx_terms<A>(f, part, sums[0][v], sums[1][v], sums[2][v], tile.fixed[v]);
    }
    tile.for_channels([&](const Pack<T, VEC>& xs, int64_t c, int i) {
      A g[VEC];
      if constexpr (kHolds) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) g[v] = g_held[i][v];
      } else {
        const Pack<T, VEC> dys = dy_at(c);
        A w, b;
        tile.affine(c, w, b);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          g[v] = w * element<T>(widen(xs.value[v]), widen(dys.value[v]), tile.mean[v], tile.rstd[v], w, b, f.silu).dz;
        }
      }
      Pack<T, VEC> dx;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const A xhat = (widen(xs.value[v]) - tile.mean[v]) * tile.rstd[v];
        dx.value[v] = narrow<T>(tile.rstd[v] * (g[v] - terms[v].shift - xhat * terms[v].gx_mean));
      }
      store_pack(static_cast<T*>(p.dx) + at(c), dx);
    });
  }
  if constexpr (ITERS > 0) {
#pragma unroll
    for (int i = 0; i < ITERS; ++i) {
      add_up(weight_sums[i], bias_sums[i], threadIdx.y + static_cast<int64_t>(i) * blockDim.y, true);
    }
  }
}

// Adds up `partials` rows of [2][C]: a block has 32 columns of them, 8 threads a column.
template <typename A>
__global__ void __launch_bounds__(kNormThreads)
    channel_norm_affine_kernel(const ChannelNormBackwardParams p, int64_t partials) {
  __shared__ double sums[kNormWarps][32];
  const int64_t channels = p.forward.layout.channels, column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  double sum = 0;
  if (column < 2 * channels) {
    const A* from = static_cast<const A*>(p.partial) + column;
    for (int64_t row = threadIdx.y; row < partials; row += kNormWarps) sum += from[row * 2 * channels];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= 2 * channels) return;
  for (int i = 1; i < kNormWarps; ++i) sum += sums[i][threadIdx.x];
  if (column < channels) {
    if (p.dweight != nullptr) store_rounded(p.dweight, p.dweight_dtype, column, sum);
  } else if (p.dbias != nullptr) {
    store_rounded(p.dbias, p.dbias_dtype, column - channels, sum);
  }
}

template <typename A>
void launch_affine(const ChannelNormBackwardParams& p, int64_t partials, cudaStream_t stream) {
  VK_CUDA_CHECK_LAUNCH();
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  const dim3 grid(static_cast<unsigned>((2 * p.forward.layout.channels + 31) / 32));
  VK_LAUNCH((channel_norm_affine_kernel<A>), grid, dim3(32, kNormWarps), 0, stream)(p, partials);
}

template <typename T, int VEC, int ITERS>
void launch_rows(const ChannelNormBackwardParams& p, int lanes, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t groups = kNormThreads / lanes, channels = p.forward.layout.channels;
  const int64_t most = ITERS > 0 ? kNormMaxBlocks : kNormMaxBlocks / kNormWarps;
  const int64_t blocks = std::min<int64_t>(most, (p.forward.layout.positions() + groups - 1) / groups);
  const size_t shared = ITERS > 0 ? 2 * channels * sizeof(A) : 0;
  VK_LAUNCH((channel_norm_rows_bwd_kernel<T, VEC, ITERS>), static_cast<unsigned>(blocks), kNormThreads, shared, stream)
  (p, lanes);
  launch_affine<A>(p, ITERS > 0 ? blocks : blocks * kNormWarps, stream);
}

template <typename T, int VEC>
void dispatch_rows(const ChannelNormBackwardParams& p, cudaStream_t stream) {
  // x, dy, g and two sums of every element are in registers
  constexpr int kChoices[] = {1, 2, 3, 4, 8};
  constexpr int kFitting = VEC * 8 <= 32 ? 5 : 4;
  const RowShape shape = row_shape(p.forward.layout.channels / VEC, kChoices, kFitting, 33);
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
      if constexpr (kFitting == 5) return launch_rows<T, VEC, 8>(p, shape.lanes, stream);
      return;
    default:
      return launch_rows<T, VEC, 0>(p, 32, stream);
  }
}

template <typename T, int VEC, int X, int ITERS>
void launch_planes(const ChannelNormBackwardParams& p, int columns, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t tiles = plane_tiles<VEC, X>(p.forward.layout), blocks = std::min(kNormMaxBlocks, tiles);
  const dim3 block(X, static_cast<unsigned>(columns));
  const size_t shared = plane_shared_bytes<A, VEC, X, ITERS>(columns, p.forward.layout.channels);
  VK_LAUNCH((channel_norm_planes_bwd_kernel<T, VEC, X, ITERS>), static_cast<unsigned>(blocks), block, shared, stream)
  (p, tiles);
  launch_affine<A>(p, blocks, stream);
}

template <typename T, int VEC, int X, int kMaxIters>
void dispatch_planes(const ChannelNormBackwardParams& p, cudaStream_t stream) {
  const PlaneShape shape = plane_shape<X>(p.forward.layout.channels, kMaxIters);
  switch (shape.iters) {
    case 4:
      return launch_planes<T, VEC, X, 4>(p, shape.columns, stream);
    case 8:
      if constexpr (kMaxIters >= 8) launch_planes<T, VEC, X, 8>(p, shape.columns, stream);
      return;
    case 16:
      if constexpr (kMaxIters >= 16) launch_planes<T, VEC, X, 16>(p, shape.columns, stream);
      return;
    default:
      return launch_planes<T, VEC, X, 0>(p, shape.columns, stream);
  }
}

template <typename T>
void launch(const ChannelNormBackwardParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool aligned = aligned16(p.forward.x) && aligned16(p.dy) && aligned16(p.dx);
  const bool wide = aligned && norm_vectors_fit(p.forward.layout, kVec);
  if (p.forward.layout.rows) {
    wide ? dispatch_rows<T, kVec>(p, stream) : dispatch_rows<T, 1>(p, stream);
    return;
  }
  if (!wide) return dispatch_planes<T, 1, 32, 8>(p, stream);
  // Five values a position besides x: vectors of 8 would spill, and 8 threads of 8 bytes still fill two sectors.
  constexpr int kPlaneVec = kVec < 4 ? kVec : 4;
  dispatch_planes<T, kPlaneVec, 8, sizeof(T) <= 4 ? 8 : 4>(p, stream);
}

}  // namespace

// Rows of [2][C] that the sums of a call need at most.
int64_t channel_norm_bwd_partials() { return kNormMaxBlocks; }

void channel_norm_bwd_cuda(const ChannelNormBackwardParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.forward.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
