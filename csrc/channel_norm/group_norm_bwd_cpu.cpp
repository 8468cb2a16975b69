// SPDX-License-Identifier: Apache-2.0
// Backward of the group norm in two passes over memory: per sample and channel the sums of dz and of dz * (x - mean),
// from which everything else follows in float64, then dx = dz * scale - (x - mean) * slope - offset.
#include "channel_norm/group_norm_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Runs of a sample's rows that keep sums of their own.
constexpr int64_t kMaxChunks = 64;
// Rows side by side, which share what is read per channel. Their sums, in float32, are added up in float64: float32
// sums of 16 values, added up over a clip, lose twice what the rounding of the values themselves does.
constexpr int kRowsTogether = 4;

template <typename T>
struct GroupBackward : GroupKernel<T> {
  using Base = GroupKernel<T>;
  using Base::L;
  using Base::p;
  using Base::per_group;
  using Base::pieces;
  using typename Base::A;
  using typename Base::Coefficients;
  using typename Base::V;

  const GroupNormBackwardParams& b;
  std::vector<double> weight_sums, bias_sums;  // [samples][channels]: of dz * (x - mean), of dz
  std::vector<double> slopes;                  // [samples][groups]: of dx, against xhat
  std::vector<A> offsets;                      // [samples][groups]: of dx

  explicit GroupBackward(const GroupNormBackwardParams& params)
      : Base(params.forward),
        b(params),
        weight_sums(p.samples() * p.channels),
        bias_sums(p.samples() * p.channels),
        slopes(p.samples() * p.groups),
        offsets(p.samples() * p.groups) {}

  // Sums over a piece of one channel.
  template <Ending kEnding>
  void plane_sums(const Piece& piece, const Coefficients& k, double* out) const {
    const int64_t offset = pieces.offset(piece), c = piece.channel;
    const T* x = static_cast<const T*>(p.x) + offset;
    const T* dy = static_cast<const T*>(b.dy) + offset;
    const V mean = broadcast(k.mean[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
    WideSum<A> weight_sum, bias_sum;
    int64_t i = 0;
    for (; i + L <= piece.count; i += L) {
      const V d = load_vec(x + i) - mean, dz = through<A, kEnding, true>(load_vec(dy + i), d * scale + shift);
      weight_sum += dz * d;
      bias_sum += dz;
    }
    if (const int tail = static_cast<int>(piece.count - i); tail != 0) {
      const V live = lane_flags<A>(tail), d = load_part(x + i, tail) - mean;
      const V dz = through<A, kEnding, true>(load_part(dy + i, tail), d * scale + shift);
      weight_sum += live != A(0) ? dz * d : V{};
      bias_sum += live != A(0) ? dz : V{};
    }
    out[0] = weight_sum.total();
    out[1] = bias_sum.total();
  }

  // Adds R rows to sums per channel.
  template <int R, Ending kEnding>
  void add_rows(const T* x, const T* dy, const Coefficients& k, double* weights, double* biases) const {
    const int64_t step = p.position_stride;
    const auto add = [&](const auto& load, int64_t c) __attribute__((always_inline)) {
      const V mean = load_vec(&k.mean[c]), scale = load_vec(&k.scale[c]), shift = load_vec(&k.shift[c]);
      V weight[2] = {}, bias[2] = {};
      for (int i = 0; i < R; ++i) {
        __builtin_prefetch(x + (i + R) * step + c);
        __builtin_prefetch(dy + (i + R) * step + c);
        const V d = load(x + i * step + c) - mean;
        const V dz = through<A, kEnding, true>(load(dy + i * step + c), d * scale + shift);
        weight[i % 2] += dz * d;
        bias[i % 2] += dz;
      }
      add_wide<A>(weights + c, weight[0] + weight[1]);
      add_wide<A>(biases + c, bias[0] + bias[1]);
    };
    const int64_t whole = p.channels / L * L;
    const int tail = static_cast<int>(p.channels - whole);
    for (int64_t c = 0; c < whole; c += L) add([](const T* from) { return load_vec(from); }, c);
    if (tail != 0) add([=](const T* from) { return load_part(from, tail); }, whole);
  }

  // Adds a piece of rows to sums per channel.
  template <Ending kEnding>
  void row_sums(const Piece& piece, const Coefficients& k, double* weights, double* biases) const {
    const int64_t step = p.position_stride;
    const T* x = static_cast<const T*>(p.x) + pieces.offset(piece);
    const T* dy = static_cast<const T*>(b.dy) + pieces.offset(piece);
    int64_t i = 0;
    for (; i + kRowsTogether <= piece.count; i += kRowsTogether) {
      add_rows<kRowsTogether, kEnding>(x + i * step, dy + i * step, k, weights, biases);
    }
    for (; i < piece.count; ++i) add_rows<1, kEnding>(x + i * step, dy + i * step, k, weights, biases);
  }

  template <Ending kEnding>
  void reduce_planes() {
    std::vector<double> parts(2 * pieces.count());
    this->for_pieces(
        [&](int64_t i, const Piece& piece, const Coefficients& k) { plane_sums<kEnding>(piece, k, &parts[2 * i]); });
    for (int64_t at = 0; at < p.samples() * p.channels; ++at) {
      for (int64_t i = 0; i < pieces.per_channel(); ++i) {
        weight_sums[at] += parts[2 * (at * pieces.per_channel() + i)];
        bias_sums[at] += parts[2 * (at * pieces.per_channel() + i) + 1];
      }
    }
  }

  template <Ending kEnding>
  void reduce_rows() {
    const int64_t per_sample = pieces.per_sample(), chunks = std::min(kMaxChunks, per_sample), padded = p.channels + L;
    std::vector<double> parts(p.samples() * chunks * 2 * padded);
    parallel_for(0, p.samples() * chunks, 1, [&](int64_t begin, int64_t end) {
      Coefficients k = this->coefficients();
      for (int64_t at = begin; at < end; ++at) {
        const int64_t sample = at / chunks, chunk = at % chunks;
        this->set_sample(k, sample);
        for (int64_t i = per_sample * chunk / chunks; i < per_sample * (chunk + 1) / chunks; ++i) {
          double* weights = &parts[at * 2 * padded];
          row_sums<kEnding>(pieces.at(sample * per_sample + i), k, weights, weights + padded);
        }
      }
    });
    for (int64_t at = 0; at < p.samples() * chunks; ++at) {
      const int64_t sample = at / chunks;
      for (int64_t c = 0; c < p.channels; ++c) {
        weight_sums[sample * p.channels + c] += parts[at * 2 * padded + c];
        bias_sums[sample * p.channels + c] += parts[(at * 2 + 1) * padded + c];
      }
    }
  }

  // dweight, dbias, and what dx needs of each group.
  void finish_sums() {
    const double count = static_cast<double>(per_group * p.positions);
    std::vector<double> weights(p.channels), biases(p.channels);
    for (int64_t sample = 0; sample < p.samples(); ++sample) {
      for (int64_t g = 0; g < p.groups; ++g) {
        const auto s = this->statistics_of(sample, g);
        double weight_mean = 0, bias_mean = 0;  // over the group, of weight * dz * xhat and of weight * dz
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          const double bias = bias_sums[sample * p.channels + c], weight = static_cast<double>(this->weight[c]);
          const double product = (weight_sums[sample * p.channels + c] - s.rest * bias) * s.rstd;  // sum of dz * xhat
          weights[c] += product;
          biases[c] += bias;
          weight_mean += product * weight / count;
          bias_mean += bias * weight / count;
        }
        const double slope = weight_mean * s.rstd;
        slopes[sample * p.groups + g] = slope;
        offsets[sample * p.groups + g] = static_cast<A>(bias_mean * s.rstd - s.rest * slope * s.rstd);
      }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      if (b.dweight != nullptr) store_affine(b.dweight, p.weight_dtype, c, weights[c]);
      if (b.dbias != nullptr) store_affine(b.dbias, p.bias_dtype, c, biases[c]);
    }
  }

  // Whether rstd^2, and with it the slope against x - mean, leaves float32 in a sample.
  bool is_large(int64_t sample) const {
    const double* rstd = p.rstd + sample * p.groups;
    return std::is_same<A, float>::value && std::any_of(rstd, rstd + p.groups, [](double r) { return r < 1e-16; });
  }

  // Of a sample's groups, per channel: xhat = (x - mean) * rstd where it is large, otherwise the slope has rstd in it.
  struct Lines {
    std::vector<A> slope, offset, rstd;
    explicit Lines(int64_t size) : slope(size), offset(size), rstd(size) {}
  };
  void spread(int64_t sample, bool large, Lines& lines) const {
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = sample * p.groups + c / per_group;
      lines.rstd[c] = static_cast<A>(p.rstd[at]);
      lines.slope[c] = static_cast<A>(large ? slopes[at] : slopes[at] * p.rstd[at]);
      lines.offset[c] = offsets[at];
    }
  }

  template <Ending kEnding, bool kLarge>
  VK_ALWAYS_INLINE V dx_of(V x, V dy, V mean, V scale, V shift, V rstd, V slope, V offset) const {
    const V d = x - mean, dz = through<A, kEnding>(dy, d * scale + shift);
    return dz * scale - ((kLarge ? d * rstd : d) * slope + offset);
  }

  template <Ending kEnding, bool kLarge>
  void write_dx(const Piece& piece, const Coefficients& k, const Lines& lines) const {
    const int64_t offset = pieces.offset(piece), rows = p.rows() ? piece.count : 1;
    const int64_t length = p.rows() ? p.channels : piece.count, whole = length / L * L;
    const int tail = static_cast<int>(length - whole);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = offset + (p.rows() ? i * p.position_stride : 0);
      const T* x = static_cast<const T*>(p.x) + start;
      const T* dy = static_cast<const T*>(b.dy) + start;
      T* dx = static_cast<T*>(b.dx) + start;
      const auto at = [&](V value, V grad, int64_t c) {
        if (!p.rows()) {
          const int64_t one = piece.channel;
          return dx_of<kEnding, kLarge>(value, grad, broadcast(k.mean[one]), broadcast(k.scale[one]),
                                        broadcast(k.shift[one]), broadcast(lines.rstd[one]),
                                        broadcast(lines.slope[one]), broadcast(lines.offset[one]));
        }
        return dx_of<kEnding, kLarge>(value, grad, load_vec(&k.mean[c]), load_vec(&k.scale[c]), load_vec(&k.shift[c]),
                                      load_vec(&lines.rstd[c]), load_vec(&lines.slope[c]), load_vec(&lines.offset[c]));
      };
      for (int64_t c = 0; c < whole; c += L) store_vec(dx + c, at(load_vec(x + c), load_vec(dy + c), c));
      if (tail != 0) store_part(dx + whole, at(load_part(x + whole, tail), load_part(dy + whole, tail), whole), tail);
    }
  }

  template <Ending kEnding>
  void run() {
    p.rows() ? reduce_rows<kEnding>() : reduce_planes<kEnding>();
    finish_sums();
    if (b.dx == nullptr) return;
    parallel_for(0, pieces.count(), pieces.grain(), [&](int64_t begin, int64_t end) {
      Coefficients k = this->coefficients();
      Lines lines(p.channels + L);
      int64_t sample = -1;
      bool large = false;
      for (int64_t i = begin; i < end; ++i) {
        const Piece piece = pieces.at(i);
        if (piece.sample != sample) {
          this->set_sample(k, sample = piece.sample);
          spread(sample, large = is_large(sample), lines);
        }
        large ? write_dx<kEnding, true>(piece, k, lines) : write_dx<kEnding, false>(piece, k, lines);
      }
    });
  }
};

}  // namespace

void group_norm_bwd(const GroupNormBackwardParams& params) {
  VK_DISPATCH_FLOATING(params.forward.dtype, [&] {
    GroupBackward<scalar_t> kernel(params);
    kernel.with_ending([&](auto ending) { kernel.template run<decltype(ending)::value>(); });
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
