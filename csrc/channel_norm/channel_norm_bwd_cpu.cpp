// SPDX-License-Identifier: Apache-2.0
// Backward of the channel norm: x and dy are read once from memory, dx is written once. Positions are cut into a number
// of chunks that depends on the shape alone, and every chunk has its own sums of dweight and dbias, so results do not
// depend on the number of threads.
#include "channel_norm/channel_norm_rows.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kMaxChunks = 64;
// Rows or tiles after which the float32 sums of a chunk go to its float64 sums.
constexpr int64_t kFlushEvery = 16;

// dweight and dbias of one chunk: `lanes` partial sums per channel, added up in two levels.
template <typename A>
class Sums {
 public:
  Sums(int64_t channels, int lanes)
      : lanes_(lanes), near_(2 * size(channels)), far_(2 * channels), channels_(channels) {}

  A* weight() { return near_.data(); }
  A* bias() { return near_.data() + size(channels_); }

  void flush() {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int i = 0; i < lanes_; ++i) {
        far_[c] += weight()[c * lanes_ + i];
        far_[channels_ + c] += bias()[c * lanes_ + i];
      }
    }
    std::fill(near_.begin(), near_.end(), A(0));
  }
  double weight_total(int64_t c) const { return far_[c]; }
  double bias_total(int64_t c) const { return far_[channels_ + c]; }

 private:
  int64_t size(int64_t channels) const { return channels * lanes_ + kLanes<A>; }

  int lanes_;
  std::vector<A> near_;
  std::vector<double> far_;
  int64_t channels_;
};

// Runs `work(begin, end, sums)` over [0, units) in chunks, then writes dweight and dbias.
template <typename A, typename F>
void reduce_chunks(const ChannelNormBackwardParams& p, int64_t units, int64_t unit_size, int lanes, const F& work) {
  const int64_t channels = p.forward.layout.channels;
  const int64_t wanted = units * unit_size / kParallelGrain;
  const int64_t chunks = std::max<int64_t>(1, std::min({kMaxChunks, units, wanted}));
  std::vector<Sums<A>> sums(chunks, Sums<A>(channels, lanes));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      work(units * i / chunks, units * (i + 1) / chunks, sums[i]);
      sums[i].flush();
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double weight = 0, bias = 0;
    for (const Sums<A>& part : sums) {
      weight += part.weight_total(c);
      bias += part.bias_total(c);
    }
    if (p.dweight != nullptr) store_affine(p.dweight, p.dweight_dtype, c, weight);
    if (p.dbias != nullptr) store_affine(p.dbias, p.dbias_dtype, c, bias);
  }
}

// dz from dy and z.
template <typename A>
VK_ALWAYS_INLINE Vec<A> through_silu(Vec<A> dy, Vec<A> z) {
  const Sigmoid<A> s = sigmoid_pair<A>(z);
  return dy * (s.plus + z * s.plus * s.minus);
}

template <typename T>
struct RowsBackward {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const ChannelNormBackwardParams& p;
  std::vector<A> weight, bias;

  explicit RowsBackward(const ChannelNormBackwardParams& params)
      : p(params),
        weight(widened<A>(params.forward.weight, params.forward.layout.channels, A(1))),
        bias(widened<A>(params.forward.bias, params.forward.layout.channels, A(0))) {}

  // One row. `held` receives g = dz * weight.
  void row(const T* x, const T* dy, T* dx, A* held, Sums<A>& sums) const {
    const int64_t channels = p.forward.layout.channels, whole = channels / L * L;
    const int tail = static_cast<int>(channels - whole);
    const bool centred = p.forward.kind == NormKind::layer;
    const RowMoments<A> moments = row_moments(x, channels, centred);
    A rstd = moments.square_sum;
    scales_of<A>(p.forward.kind, &rstd, 1, channels, p.forward.eps);
    V g_sum{}, gx_sum{}, x_sum{};
    const auto step = [&](V value, V grad, int64_t c) {
      const V xhat = (value - moments.mean) * rstd;
      const V w = load_vec(weight.data() + c);
      const V dz = p.forward.silu ? through_silu<A>(grad, xhat * w + load_vec(bias.data() + c)) : grad;
      const V g = dz * w;
      store_vec(sums.weight() + c, load_vec(sums.weight() + c) + dz * xhat);
      store_vec(sums.bias() + c, load_vec(sums.bias() + c) + dz);
      store_vec(held + c, g);
      g_sum += g;
      gx_sum += g * xhat;
      return xhat;
    };
    for (int64_t c = 0; c < whole; c += L) x_sum += step(load_vec(x + c), load_vec(dy + c), c);
    if (tail != 0) {
      // dy and weight are 0 behind the row's end
      x_sum += step(load_part(x + whole, tail), load_part(dy + whole, tail), whole) * lane_flags<A>(tail);
    }
    if (dx == nullptr) return;
    const A count = static_cast<A>(channels);
    const A gx_mean =
        rstd >= fixed_scale<A>(p.forward.kind, channels, p.forward.eps) ? A(0) : sum_lanes<A>(gx_sum) / count;
    // mean(xhat) is 0 but for the rounding of mean; left in, rstd would magnify it where the variance is small
    const A shift = centred ? (sum_lanes<A>(g_sum) - gx_mean * sum_lanes<A>(x_sum)) / count : A(0);
    const auto result = [&](V value, int64_t c) {
      return (load_vec(held + c) - shift - (value - moments.mean) * rstd * gx_mean) * rstd;
    };
    for (int64_t c = 0; c < whole; c += L) store_vec(dx + c, result(load_vec(x + c), c));
    if (tail != 0) store_part(dx + whole, result(load_part(x + whole, tail), whole), tail);
  }

  void run() const {
    const ChannelLayout& layout = p.forward.layout;
    const int last = layout.dims - 1;
    reduce_chunks<A>(p, layout.positions(), layout.channels, 1, [&](int64_t begin, int64_t end, Sums<A>& sums) {
      std::vector<A> held(layout.channels + L);
      int64_t done = 0;
      for_each_run(layout, begin, end, [&](Offsets at, int64_t count) {
        const T* x = static_cast<const T*>(p.forward.x) + at.x;
        const T* dy = static_cast<const T*>(p.dy) + at.y;
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + at.y;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t y_offset = i * layout.y_stride[last];
          row(x + i * layout.x_stride[last], dy + y_offset, dx == nullptr ? nullptr : dx + y_offset, held.data(), sums);
          if (++done % kFlushEvery == 0) sums.flush();
        }
      });
    });
  }
};

template <typename T>
struct PlanesBackward {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const ChannelNormBackwardParams& p;
  std::vector<A> weight, bias;

  explicit PlanesBackward(const ChannelNormBackwardParams& params)
      : p(params),
        weight(widened<A>(params.forward.weight, params.forward.layout.channels, A(1))),
        bias(widened<A>(params.forward.bias, params.forward.layout.channels, A(0))) {}

  // x of a tile into `buffer`, with the sums over the channels; rows as in the forward.
  template <int N>
  VK_ALWAYS_INLINE void load_tile(const T* x, const TileShape& shape, A* buffer, V (&sum)[N]) const {
    for (int64_t c = 0; c < p.forward.layout.channels; ++c) {
      for (int v = 0; v < N; ++v) {
        const T* from = x + c * p.forward.layout.x_channel + v * L;
        const V value = v < N - 1 || c < shape.whole_rows ? load_vec(from) : load_part(from, shape.last);
        store_vec(buffer + (c * N + v) * L, value);
        sum[v] += value;
      }
    }
  }

  // `buffer`: xhat of the tile, then g = dz * weight.
  template <int N>
  void tile(const T* x, const T* dy, T* dx, const TileShape& shape, A* buffer, Sums<A>& sums) const {
    const int64_t channels = p.forward.layout.channels, y_step = p.forward.layout.y_channel;
    V sum[N] = {}, mean[N], rstd[N], g_sum[N] = {}, gx_sum[N] = {}, x_sum[N] = {};
    load_tile<N>(x, shape, buffer, sum);
    tile_statistics<A, N>(p.forward.kind, buffer, channels, p.forward.eps, sum, mean, rstd);
    A* held = buffer + channels * N * L;
    const V live = lane_flags<A>(shape.last);
    for (int64_t c = 0; c < channels; ++c) {
      V weight_sum{}, bias_sum{};
      for (int v = 0; v < N; ++v) {
        A* at = buffer + (c * N + v) * L;
        const T* from = dy + c * y_step + v * L;
        V dz = v < N - 1 || c < shape.whole_rows ? load_vec(from) : load_part(from, shape.last);
        const V xhat = (load_vec(at) - mean[v]) * rstd[v];
        if (p.forward.silu) dz = through_silu<A>(dz, xhat * weight[c] + bias[c]);
        V product = dz * xhat;
        if (v == N - 1) {
          // whatever the lanes behind the tile hold, they add nothing to the sums over positions
          dz = live != A(0) ? dz : V{};
          product = live != A(0) ? product : V{};
        }
        const V g = dz * weight[c];
        weight_sum += product;
        bias_sum += dz;
        g_sum[v] += g;
        gx_sum[v] += g * xhat;
        x_sum[v] += xhat;
        store_vec(at, xhat);
        store_vec(held + (c * N + v) * L, g);
      }
      store_vec(sums.weight() + c * L, load_vec(sums.weight() + c * L) + weight_sum);
      store_vec(sums.bias() + c * L, load_vec(sums.bias() + c * L) + bias_sum);
    }
    if (dx != nullptr) store_dx<N>(dx, shape, buffer, rstd, g_sum, gx_sum, x_sum);
  }

  template <int N>
  VK_ALWAYS_INLINE void store_dx(T* dx, const TileShape& shape, const A* buffer, const V (&rstd)[N],
                                 const V (&g_sum)[N], const V (&gx_sum)[N], const V (&x_sum)[N]) const {
    const int64_t channels = p.forward.layout.channels;
    const A count = static_cast<A>(channels), fixed = fixed_scale<A>(p.forward.kind, channels, p.forward.eps);
    const A* held = buffer + channels * N * L;
    V shift[N], gx_mean[N];
    for (int v = 0; v < N; ++v) {
      gx_mean[v] = rstd[v] >= fixed ? V{} : gx_sum[v] / count;
      shift[v] = p.forward.kind == NormKind::layer ? (g_sum[v] - gx_mean[v] * x_sum[v]) / count : V{};
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int v = 0; v < N; ++v) {
        const int64_t at = (c * N + v) * L;
        const V value = (load_vec(held + at) - shift[v] - load_vec(buffer + at) * gx_mean[v]) * rstd[v];
        T* to = dx + c * p.forward.layout.y_channel + v * L;
        if (v < N - 1 || c < shape.whole_rows) {
          store_vec(to, value);
        } else {
          store_part(to, value, shape.last);
        }
      }
    }
  }

  void run() const {
    const ChannelLayout& layout = p.forward.layout;
    const Tiles<A> all(layout);
    reduce_chunks<A>(p, all.count(), all.size(), L, [&](int64_t begin, int64_t end, Sums<A>& sums) {
      VectorBuffer<A> buffer(2 * layout.channels * Tiles<A>::kWidth);
      int64_t done = 0;
      all.visit(begin, end, [&](Offsets at, const TileShape& shape) {
        const T* x = static_cast<const T*>(p.forward.x) + at.x;
        const T* dy = static_cast<const T*>(p.dy) + at.y;
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + at.y;
        with_vectors(shape.vectors, [&](auto n) { tile<decltype(n)::value>(x, dy, dx, shape, buffer.data(), sums); });
        if (++done % kFlushEvery == 0) sums.flush();
      });
    });
  }
};

}  // namespace

void channel_norm_bwd(const ChannelNormBackwardParams& params) {
  VK_DISPATCH_FLOATING(params.forward.dtype, [&] {
    if (params.forward.layout.rows) {
      RowsBackward<scalar_t>(params).run();
    } else {
      PlanesBackward<scalar_t>(params).run();
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
