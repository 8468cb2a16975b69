// SPDX-License-Identifier: Apache-2.0
// Forward of the channel norm: one read of x and one write of y from and to memory; the passes over the C values of a
// position in between hit the L1 or L2 cache.
#include "channel_norm/row_kernel.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

template <typename T>
struct Rows : RowKernel<T> {
  using Base = RowKernel<T>;
  using Base::L;
  using Base::p;
  using typename Base::A;
  using typename Base::V;

  explicit Rows(const ChannelNormParams& params) : Base(params) {}

  template <int R, Ending kEnding>
  VK_ALWAYS_INLINE void rows(const T* x, T* y) const {
    const int64_t x_step = p.layout.x_stride[p.layout.dims - 1], y_step = p.layout.y_stride[p.layout.dims - 1];
    A mean[R], rstd[R];
    this->template statistics<R>(x, x_step, mean, rstd);
    this->for_packs([&](int64_t c, auto last) __attribute__((always_inline)) {
      const A *weight = this->weight.data() + c, *bias = this->bias.data() + c;
      for (int r = 0; r < R; ++r) {
        this->prefetch(x + (r + R) * x_step + c);  // the next block
        Pack<T> values = this->load(x + r * x_step + c, last);
        for (int i = 0; i < 2; ++i) {
          const V xhat = (values.v[i] - mean[r]) * rstd[r];
          values.v[i] = ended_as<T, kEnding>(xhat * load_vec(weight + i * L) + load_vec(bias + i * L));
        }
        this->store(y + r * y_step + c, values, last);
      }
    });
  }

  template <Ending kEnding>
  void run() const {
    const int64_t grain = std::max<int64_t>(1, kParallelGrain / p.layout.channels);
    parallel_for(0, p.layout.positions(), grain, [&](int64_t begin, int64_t end) {
      this->for_blocks(begin, end, [&](auto count, Offsets at) __attribute__((always_inline)) {
        rows<decltype(count)::value, kEnding>(static_cast<const T*>(p.x) + at.x, static_cast<T*>(p.y) + at.y);
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

  template <typename F>
  void with_ending(const F& f) const {
    vidkernels::with_ending<A>(p.silu, keeps_finite(weight.data(), bias.data(), p.layout.channels), f);
  }

  // N vectors of positions, in rows before `whole_rows` all of them complete, in the others `last` lanes of the N-th.
  template <int N, Ending kEnding>
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
        const V value = ended_as<T, kEnding>(d * weight[c] + bias[c]);
        T* to = y + c * y_step + v * L;
        if (v < N - 1 || c < whole_rows) {
          store_vec(to, value);
        } else {
          store_part(to, value, last);
        }
      }
    }
  }

  template <Ending kEnding>
  void run() const {
    const Tiles<A> all(p.layout);
    const int64_t grain = std::max<int64_t>(1, kParallelGrain / all.size());
    parallel_for(0, all.count(), grain, [&](int64_t begin, int64_t end) {
      VectorBuffer<A> buffer(p.layout.channels * Tiles<A>::kWidth);
      all.visit(begin, end, [&](Offsets at, const TileShape& shape) {
        const T* x = static_cast<const T*>(p.x) + at.x;
        T* y = static_cast<T*>(p.y) + at.y;
        with_vectors(shape.vectors, [&](auto n) {
          tile<decltype(n)::value, kEnding>(x, y, shape.last, shape.whole_rows, buffer.data());
        });
      });
    });
  }
};

}  // namespace

void channel_norm_fwd(const ChannelNormParams& params) {
  VK_DISPATCH_FLOATING(params.dtype, [&] {
    if (params.layout.rows) {
      const Rows<scalar_t> rows(params);
      rows.with_ending([&](auto ending) { rows.template run<decltype(ending)::value>(); });
    } else {
      const Planes<scalar_t> planes(params);
      planes.with_ending([&](auto ending) { planes.template run<decltype(ending)::value>(); });
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
