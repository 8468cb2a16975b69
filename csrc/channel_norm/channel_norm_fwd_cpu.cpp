// SPDX-License-Identifier: Apache-2.0
// Forward of the channel norm: one read of x and one write of y from and to memory; the passes over the C values of a
// position in between hit the L1 or L2 cache.
#include "channel_norm/channel_norm_rows.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

template <typename T>
struct Rows {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const ChannelNormParams& p;
  std::vector<A> weight, bias;
  int64_t whole;  // elements of a row in whole vectors
  int tail;

  explicit Rows(const ChannelNormParams& params)
      : p(params),
        weight(widened<A>(params.weight, params.layout.channels, A(1))),
        bias(widened<A>(params.bias, params.layout.channels, A(0))),
        whole(params.layout.channels / L * L),
        tail(static_cast<int>(params.layout.channels % L)) {}

  template <bool kSilu>
  VK_ALWAYS_INLINE V finish(V x, A mean, A rstd, int64_t c) const {
    const V z = (x - mean) * rstd * load_vec(weight.data() + c) + load_vec(bias.data() + c);
    return kSilu ? silu<A>(z) : z;
  }

  template <bool kSilu>
  void row(const T* x, T* y) const {
    const RowMoments<A> moments = row_moments(x, p.layout.channels, p.kind == NormKind::layer);
    const A mean = moments.mean;
    A rstd = moments.square_sum;
    scales_of<A>(p.kind, &rstd, 1, p.layout.channels, p.eps);
    int64_t c = 0;
    for (; c < whole; c += L) store_vec(y + c, finish<kSilu>(load_vec(x + c), mean, rstd, c));
    if (tail != 0) store_part(y + c, finish<kSilu>(load_part(x + c, tail), mean, rstd, c), tail);
  }

  void run() const {
    const ChannelLayout& layout = p.layout;
    const int64_t grain = std::max<int64_t>(1, kParallelGrain / layout.channels);
    const int64_t x_step = layout.x_stride[layout.dims - 1], y_step = layout.y_stride[layout.dims - 1];
    parallel_for(0, layout.positions(), grain, [&](int64_t begin, int64_t end) {
      for_each_run(layout, begin, end, [&](Offsets at, int64_t count) {
        const T* x = static_cast<const T*>(p.x) + at.x;
        T* y = static_cast<T*>(p.y) + at.y;
        for (int64_t i = 0; i < count; ++i) {
          p.silu ? row<true>(x + i * x_step, y + i * y_step) : row<false>(x + i * x_step, y + i * y_step);
        }
      });
    });
  }
};

// Positions adjacent: a tile of at most kTileVectors vectors of positions goes through all channels. It is copied into
// a dense buffer on the way, since channel strides are often multiples of 4 KB, which all fall into one cache set.
template <typename T>
struct Planes {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const ChannelNormParams& p;
  std::vector<A> weight, bias;

  explicit Planes(const ChannelNormParams& params)
      : p(params),
        weight(widened<A>(params.weight, params.layout.channels, A(1))),
        bias(widened<A>(params.bias, params.layout.channels, A(0))) {}

  // N vectors of positions, in rows before `whole_rows` all of them complete, in the others `last` lanes of the N-th.
  template <int N, bool kSilu>
  void tile(const T* x, T* y, int last, int64_t whole_rows, A* buffer) const {
    const int64_t channels = p.layout.channels, x_step = p.layout.x_channel, y_step = p.layout.y_channel;
    V sum[N] = {}, mean[N], rstd[N];
    for (int64_t c = 0; c < channels; ++c) {
      for (int v = 0; v < N; ++v) {
        const T* from = x + c * x_step + v * L;
        const V value = v < N - 1 || c < whole_rows ? load_vec(from) : load_part(from, last);
        store_vec(buffer + (c * N + v) * L, value);
        sum[v] += value;
      }
    }
    tile_statistics<A, N>(p.kind, buffer, channels, p.eps, sum, mean, rstd);
    for (int64_t c = 0; c < channels; ++c) {
      for (int v = 0; v < N; ++v) {
        const V d = (load_vec(buffer + (c * N + v) * L) - mean[v]) * rstd[v];
        const V z = d * weight[c] + bias[c];
        const V value = kSilu ? silu<A>(z) : z;
        T* to = y + c * y_step + v * L;
        if (v < N - 1 || c < whole_rows) {
          store_vec(to, value);
        } else {
          store_part(to, value, last);
        }
      }
    }
  }

  template <int N>
  void tile_of(const T* x, T* y, int last, int64_t whole_rows, A* buffer) const {
    p.silu ? tile<N, true>(x, y, last, whole_rows, buffer) : tile<N, false>(x, y, last, whole_rows, buffer);
  }

  void run() const {
    const Tiles<A> all(p.layout);
    const int64_t grain = std::max<int64_t>(1, kParallelGrain / all.size());
    parallel_for(0, all.count(), grain, [&](int64_t begin, int64_t end) {
      VectorBuffer<A> buffer(p.layout.channels * Tiles<A>::kWidth);
      all.visit(begin, end, [&](Offsets at, const TileShape& shape) {
        const T* x = static_cast<const T*>(p.x) + at.x;
        T* y = static_cast<T*>(p.y) + at.y;
        with_vectors(shape.vectors,
                     [&](auto n) { tile_of<decltype(n)::value>(x, y, shape.last, shape.whole_rows, buffer.data()); });
      });
    });
  }
};

}  // namespace

void channel_norm_fwd(const ChannelNormParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    if (params.layout.rows) {
      Rows<scalar_t>(params).run();
    } else {
      Planes<scalar_t>(params).run();
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
