// SPDX-License-Identifier: Apache-2.0
// Backward of the channel norm: x and dy are read once from memory, dx is written once. Positions are cut into a number
// of chunks that depends on the shape alone, and every chunk has its own sums of dweight and dbias, so results do not
// depend on the number of threads.
#include "channel_norm/row_kernel.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int64_t kMaxChunks = 64;

// dweight and dbias of one chunk: `lanes` partial sums per channel. Float32 sums over 32 rows, added up over a clip,
// lost three times what the rounding of dz * xhat does.
class Sums {
 public:
  // Rows end in a pack.
  Sums(int64_t channels, int lanes) : lanes_(lanes), size_(channels * lanes + 2 * kLanes<float>), sums_(2 * size_) {}

  double* weight() { return sums_.data(); }
  double* bias() { return sums_.data() + size_; }
  double weight_total(int64_t at) const { return total(at * lanes_); }
  double bias_total(int64_t at) const { return total(size_ + at * lanes_); }

 private:
  double total(int64_t from) const {
    double sum = 0;
    for (int i = 0; i < lanes_; ++i) sum += sums_[from + i];
    return sum;
  }

  int lanes_;
  int64_t size_;
  std::vector<double> sums_;
};

// Between the sums of a block of rows and those of its chunk: sums over up to 8 rows are held in float32 and widened
// together. Widening every block of 2 costs 10 % of a backward pass and takes a fifth off the error.
template <typename T>
class HeldSums {
 public:
  using A = accumulate_t<T>;
  using V = Vec<A>;

  HeldSums(int64_t channels, Sums& sums)
      : size_((channels + kPack<T> - 1) / kPack<T> * kPack<T>),
        held_(2 * size_),
        weight_(sums.weight()),
        bias_(sums.bias()) {}

  // Adds sums over R rows of the channels from `at` on.
  template <int R>
  VK_ALWAYS_INLINE void add(int64_t at, V weight, V bias) {
    A *weights = held_.data() + at, *biases = weights + size_;
    if (rows_ != 0) {
      weight += load_vec(weights);
      bias += load_vec(biases);
    }
    if (is_last<R>()) {
      add_wide<A>(weight_ + at, weight);
      add_wide<A>(bias_ + at, bias);
    } else {
      store_vec(weights, weight);
      store_vec(biases, bias);
    }
  }
  // After all channels of a block.
  template <int R>
  VK_ALWAYS_INLINE void next() {
    rows_ = is_last<R>() ? 0 : rows_ + R;
  }
  void finish() {
    if (rows_ == 0) return;
    for (int64_t i = 0; i < size_; i += kLanes<A>) {
      add_wide<A>(weight_ + i, load_vec(held_.data() + i));
      add_wide<A>(bias_ + i, load_vec(held_.data() + size_ + i));
    }
    rows_ = 0;
  }

 private:
  template <int R>
  VK_ALWAYS_INLINE bool is_last() const {
    return std::is_same<A, double>::value || rows_ + R >= 8;
  }

  int64_t size_;
  VectorBuffer<A> held_;
  double *weight_, *bias_;
  int rows_ = 0;  // held
};

// Runs `work(begin, end, sums)` over [0, units) in chunks, then writes dweight and dbias; `place(c)` is where sums keep
// channel c.
template <typename P, typename F>
void reduce_chunks(const ChannelNormBackwardParams& p, int64_t units, int64_t unit_size, int lanes, const P& place,
                   const F& work) {
  const int64_t channels = p.forward.layout.channels;
  const int64_t wanted = units * unit_size / kParallelGrain;
  const int64_t chunks = std::max<int64_t>(1, std::min({kMaxChunks, units, wanted}));
  std::vector<Sums> sums(chunks, Sums(channels, lanes));
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(units * i / chunks, units * (i + 1) / chunks, sums[i]);
  });
  std::vector<double> weights(channels), biases(channels);
  for (const Sums& part : sums) {
    for (int64_t c = 0; c < channels; ++c) {
      weights[c] += part.weight_total(place(c));
      biases[c] += part.bias_total(place(c));
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (p.dweight != nullptr) store_affine(p.dweight, p.dweight_dtype, c, weights[c]);
    if (p.dbias != nullptr) store_affine(p.dbias, p.dbias_dtype, c, biases[c]);
  }
}

template <typename T>
struct RowsBackward : RowKernel<T> {
  using Base = RowKernel<T>;
  using Base::L;
  using Base::N;
  using typename Base::A;
  using typename Base::V;

  const ChannelNormBackwardParams& b;
  int64_t x_step, y_step;

  explicit RowsBackward(const ChannelNormBackwardParams& params)
      : Base(params.forward),
        b(params),
        x_step(params.forward.layout.x_stride[params.forward.layout.dims - 1]),
        y_step(params.forward.layout.y_stride[params.forward.layout.dims - 1]) {}

  // Of R rows: mean and rstd; sums over g = dz * weight, g * xhat and xhat.
  template <int R>
  struct RowState {
    A mean[R], rstd[R];
    V g[R] = {}, gx[R] = {}, x[R] = {};
  };

  // `held` receives g, R rows of `stride`.
  template <int R, Ending kEnding>
  VK_ALWAYS_INLINE void sum(const T* x, const T* dy, A* held, int64_t stride, RowState<R>& s, HeldSums<T>& sums) const {
    this->for_packs([&](int64_t c, auto last) __attribute__((always_inline)) {
      V weight_sum[2] = {}, bias_sum[2] = {};
      for (int r = 0; r < R; ++r) {
        const Pack<T> values = this->load(x + r * x_step + c, last), grads = this->load(dy + r * y_step + c, last);
        for (int i = 0; i < 2; ++i) {
          const V w = load_vec(this->weight.data() + c + i * L);
          V xhat = (values.v[i] - s.mean[r]) * s.rstd[r];
          if (last.value) xhat *= this->live[i];  // dy and weight are 0 behind the row's end
          const V z = xhat * w + load_vec(this->bias.data() + c + i * L);
          const V dz = through<A, kEnding>(grads.v[i], z), g = dz * w;
          weight_sum[i] += dz * xhat;
          bias_sum[i] += dz;
          store_vec(held + r * stride + c + i * L, g);
          s.g[r] += g;
          s.gx[r] += g * xhat;
          s.x[r] += xhat;
        }
      }
      for (int i = 0; i < 2; ++i) sums.template add<R>(c + i * L, weight_sum[i], bias_sum[i]);
    });
    sums.template next<R>();
  }

  template <int R, Ending kEnding>
  VK_ALWAYS_INLINE void rows(const T* x, const T* dy, T* dx, A* held, int64_t stride, HeldSums<T>& sums) const {
    const ChannelNormParams& p = this->p;
    const A count = static_cast<A>(p.layout.channels), fixed = fixed_scale<A>(p.kind, p.layout.channels, p.eps);
    RowState<R> s;
    this->template statistics<R>(x, x_step, s.mean, s.rstd);
    sum<R, kEnding>(x, dy, held, stride, s, sums);
    if (dx == nullptr) return;
    A shift[R], gx_mean[R];
    for (int r = 0; r < R; ++r) {
      gx_mean[r] = s.rstd[r] >= fixed ? A(0) : sum_lanes<A>(s.gx[r]) / count;
      // mean(xhat) is 0 but for the rounding of mean; left in, rstd would magnify it where the variance is small
      const A rest = sum_lanes<A>(s.g[r]) - gx_mean[r] * sum_lanes<A>(s.x[r]);
      shift[r] = p.kind == NormKind::layer ? rest / count : A(0);
    }
    this->for_packs([&](int64_t c, auto last) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) {
        this->prefetch(x + (r + R) * x_step + c);  // the next block
        this->prefetch(dy + (r + R) * y_step + c);
        Pack<T> values = this->load(x + r * x_step + c, last);
        for (int i = 0; i < 2; ++i) {
          const V g = load_vec(held + r * stride + c + i * L), xhat = (values.v[i] - s.mean[r]) * s.rstd[r];
          values.v[i] = (g - shift[r] - xhat * gx_mean[r]) * s.rstd[r];
        }
        this->store(dx + r * y_step + c, values, last);
      }
    });
  }

  template <Ending kEnding>
  void run() const {
    const int64_t channels = this->p.layout.channels, stride = (channels + N - 1) / N * N + L;
    const auto place = [](int64_t c) { return place_in_pack<T>(c); };
    reduce_chunks(b, this->p.layout.positions(), channels, 1, place, [&](int64_t begin, int64_t end, Sums& chunk) {
      VectorBuffer<A> held(kRowsPerBlock<T> * stride);
      HeldSums<T> sums(channels, chunk);
      this->for_blocks(begin, end, [&](auto count, Offsets at) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        const T *x = static_cast<const T*>(this->p.x) + at.x, *dy = static_cast<const T*>(b.dy) + at.y;
        T* dx = b.dx == nullptr ? nullptr : static_cast<T*>(b.dx) + at.y;
        rows<R, kEnding>(x, dy, dx, held.data(), stride, sums);
      });
      sums.finish();
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

  template <typename F>
  void with_ending(const F& f) const {
    const bool finite = keeps_finite(weight.data(), bias.data(), p.forward.layout.channels);
    vidkernels::with_ending<A>(p.forward.silu, finite, f);
  }

  // `buffer`: xhat of the tile, then g = dz * weight.
  template <int N, Ending kEnding>
  void tile(const T* x, const T* dy, T* dx, const TileShape& shape, A* buffer, Sums& sums) const {
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
        dz = through<A, kEnding>(dz, xhat * weight[c] + bias[c]);
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
      add_folded<A>(sums.weight() + c * kLanes<double>, weight_sum);
      add_folded<A>(sums.bias() + c * kLanes<double>, bias_sum);
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

  template <Ending kEnding>
  void run() const {
    const ChannelLayout& layout = p.forward.layout;
    const Tiles<A> all(layout);
    const auto place = [](int64_t c) { return c; };
    reduce_chunks(p, all.count(), all.size(), kLanes<double>, place, [&](int64_t begin, int64_t end, Sums& sums) {
      VectorBuffer<A> buffer(2 * layout.channels * Tiles<A>::kWidth);
      all.visit(begin, end, [&](Offsets at, const TileShape& shape) {
        const T* x = static_cast<const T*>(p.forward.x) + at.x;
        const T* dy = static_cast<const T*>(p.dy) + at.y;
        T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + at.y;
        with_vectors(shape.vectors,
                     [&](auto n) { tile<decltype(n)::value, kEnding>(x, dy, dx, shape, buffer.data(), sums); });
      });
    });
  }
};

}  // namespace

void channel_norm_bwd(const ChannelNormBackwardParams& params) {
  VK_DISPATCH_FLOATING(params.forward.dtype, [&] {
    if (params.forward.layout.rows) {
      const RowsBackward<scalar_t> rows(params);
      rows.with_ending([&](auto ending) { rows.template run<decltype(ending)::value>(); });
    } else {
      const PlanesBackward<scalar_t> planes(params);
      planes.with_ending([&](auto ending) { planes.template run<decltype(ending)::value>(); });
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
