// SPDX-License-Identifier: Apache-2.0
// Backward of the group norm in two passes over memory: per sample and channel the sums of dz * xhat and of dz, from
// which everything else follows, then dx.
#include "channel_norm/group_norm_cpu.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Runs of a sample's rows that keep sums of their own.
constexpr int64_t kMaxChunks = 64;
// Rows after which float32 sums go to float64 ones.
constexpr int64_t kFlushEvery = 16;

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
  std::vector<double> weight_sums, bias_sums;  // [samples][channels]: of dz * xhat, of dz
  std::vector<A> bias_means, weight_means;     // [samples][groups]: of weight * dz, of weight * dz * xhat

  explicit GroupBackward(const GroupNormBackwardParams& params)
      : Base(params.forward),
        b(params),
        weight_sums(p.samples() * p.channels),
        bias_sums(p.samples() * p.channels),
        bias_means(p.samples() * p.groups),
        weight_means(p.samples() * p.groups) {}

  // Sums over a piece of one channel.
  template <Ending kEnding>
  void plane_sums(const Piece& piece, const Coefficients& k, double* out) const {
    const int64_t offset = pieces.offset(piece), c = piece.channel;
    const T* x = static_cast<const T*>(p.x) + offset;
    const T* dy = static_cast<const T*>(b.dy) + offset;
    const V mean = broadcast(k.mean[c]), rstd = broadcast(k.rstd[c]);
    const V w = broadcast(k.weight[c]), bias = broadcast(k.bias[c]);
    out[0] = out[1] = 0;
    int64_t i = 0;
    while (i < piece.count) {
      V weight_sum{}, bias_sum{};
      const int64_t stop = std::min(piece.count, i + kFlushEvery * L);
      for (; i + L <= stop; i += L) {
        const V xhat = (load_vec(x + i) - mean) * rstd, dz = through<A, kEnding>(load_vec(dy + i), xhat * w + bias);
        weight_sum += dz * xhat;
        bias_sum += dz;
      }
      if (const int tail = static_cast<int>(stop - i); tail != 0) {
        const V live = lane_flags<A>(tail), xhat = (load_part(x + i, tail) - mean) * rstd;
        const V dz = through<A, kEnding>(load_part(dy + i, tail), xhat * w + bias);
        weight_sum += live != A(0) ? dz * xhat : V{};
        bias_sum += live != A(0) ? dz : V{};
        i = stop;
      }
      out[0] += sum_lanes<A>(weight_sum);
      out[1] += sum_lanes<A>(bias_sum);
    }
  }

  // Adds a piece of rows to sums per channel, [2][C].
  template <Ending kEnding>
  void row_sums(const Piece& piece, const Coefficients& k, std::vector<A>& near, double* far) const {
    const int64_t offset = pieces.offset(piece);
    A *weights = near.data(), *biases = near.data() + p.channels + L;
    for (int64_t i = 0; i < piece.count; ++i) {
      const T* x = static_cast<const T*>(p.x) + offset + i * p.position_stride;
      const T* dy = static_cast<const T*>(b.dy) + offset + i * p.position_stride;
      this->for_rows(x, dy, [&](V value, V grad, int64_t c) {
        const V xhat = (value - load_vec(&k.mean[c])) * load_vec(&k.rstd[c]);
        const V dz = through<A, kEnding>(grad, xhat * load_vec(&k.weight[c]) + load_vec(&k.bias[c]));
        store_vec(weights + c, load_vec(weights + c) + dz * xhat);
        store_vec(biases + c, load_vec(biases + c) + dz);
      });
      if ((i + 1) % kFlushEvery != 0 && i + 1 < piece.count) continue;
      for (int64_t c = 0; c < p.channels; ++c) {
        far[c] += weights[c];
        far[p.channels + c] += biases[c];
      }
      std::fill(near.begin(), near.end(), A(0));
    }
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
    const int64_t per_sample = pieces.per_sample(), chunks = std::min(kMaxChunks, per_sample);
    std::vector<double> parts(p.samples() * chunks * 2 * p.channels);
    parallel_for(0, p.samples() * chunks, 1, [&](int64_t begin, int64_t end) {
      Coefficients k = this->coefficients();
      std::vector<A> near(2 * (p.channels + L));
      for (int64_t at = begin; at < end; ++at) {
        const int64_t sample = at / chunks, chunk = at % chunks;
        this->set_sample(k, sample);
        for (int64_t i = per_sample * chunk / chunks; i < per_sample * (chunk + 1) / chunks; ++i) {
          row_sums<kEnding>(pieces.at(sample * per_sample + i), k, near, &parts[at * 2 * p.channels]);
        }
      }
    });
    for (int64_t at = 0; at < p.samples() * chunks; ++at) {
      const int64_t sample = at / chunks;
      for (int64_t c = 0; c < p.channels; ++c) {
        weight_sums[sample * p.channels + c] += parts[at * 2 * p.channels + c];
        bias_sums[sample * p.channels + c] += parts[(at * 2 + 1) * p.channels + c];
      }
    }
  }

  // dweight, dbias, and the means over groups that dx needs.
  void finish_sums() {
    const Coefficients k = this->coefficients();
    const double count = static_cast<double>(per_group * p.positions);
    std::vector<double> weights(p.channels), biases(p.channels), means(2 * p.groups);
    for (int64_t sample = 0; sample < p.samples(); ++sample) {
      std::fill(means.begin(), means.end(), 0.0);
      for (int64_t c = 0; c < p.channels; ++c) {
        const double weight = weight_sums[sample * p.channels + c], bias = bias_sums[sample * p.channels + c];
        weights[c] += weight;
        biases[c] += bias;
        means[2 * (c / per_group)] += weight * static_cast<double>(k.weight[c]);
        means[2 * (c / per_group) + 1] += bias * static_cast<double>(k.weight[c]);
      }
      for (int64_t g = 0; g < p.groups; ++g) {
        weight_means[sample * p.groups + g] = static_cast<A>(means[2 * g] / count);
        bias_means[sample * p.groups + g] = static_cast<A>(means[2 * g + 1] / count);
      }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      if (b.dweight != nullptr) store_affine(b.dweight, p.weight_dtype, c, weights[c]);
      if (b.dbias != nullptr) store_affine(b.dbias, p.bias_dtype, c, biases[c]);
    }
  }

  // The means of a sample's groups, per channel.
  void spread(int64_t sample, std::vector<A>& weights, std::vector<A>& biases) const {
    for (int64_t c = 0; c < p.channels; ++c) {
      weights[c] = weight_means[sample * p.groups + c / per_group];
      biases[c] = bias_means[sample * p.groups + c / per_group];
    }
  }

  template <Ending kEnding>
  VK_ALWAYS_INLINE V dx_of(V x, V dy, V mean, V rstd, V w, V bias, V weight_mean, V bias_mean) const {
    const V xhat = (x - mean) * rstd;
    return (through<A, kEnding>(dy, xhat * w + bias) * w - bias_mean - xhat * weight_mean) * rstd;
  }

  template <Ending kEnding>
  void write_dx(const Piece& piece, const Coefficients& k, const std::vector<A>& weights,
                const std::vector<A>& biases) const {
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
          return dx_of<kEnding>(value, grad, broadcast(k.mean[one]), broadcast(k.rstd[one]), broadcast(k.weight[one]),
                                broadcast(k.bias[one]), broadcast(weights[one]), broadcast(biases[one]));
        }
        return dx_of<kEnding>(value, grad, load_vec(&k.mean[c]), load_vec(&k.rstd[c]), load_vec(&k.weight[c]),
                              load_vec(&k.bias[c]), load_vec(&weights[c]), load_vec(&biases[c]));
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
      std::vector<A> weights(p.channels + L), biases(p.channels + L);
      int64_t sample = -1;
      for (int64_t i = begin; i < end; ++i) {
        const Piece piece = pieces.at(i);
        if (piece.sample != sample) {
          this->set_sample(k, sample = piece.sample);
          spread(sample, weights, biases);
        }
        write_dx<kEnding>(piece, k, weights, biases);
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
