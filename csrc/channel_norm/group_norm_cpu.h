// SPDX-License-Identifier: Apache-2.0
// What the forward and backward of the group norm share on the CPU. A sample is cut into pieces that fit the level 1
// cache; pieces depend on the shape alone, and what they add up is merged in their order, so the number of threads does
// not change results.
#pragma once

#include <algorithm>
#include <vector>

#include "channel_norm/channel_norm_rows.h"
#include "channel_norm/group_norm.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// Elements of a piece: 32 KB in float32.
constexpr int64_t kPieceElements = 8192;

// Values of all channels at `count` positions, or of one channel: what one unit of work covers.
struct Piece {
  int64_t sample, channel, first, count;
};

// Rows: pieces are runs of positions with all channels. Planes: runs of positions of one channel.
class Pieces {
 public:
  explicit Pieces(const GroupNormParams& p) : p_(p), width_(p.rows() ? p.channels : 1) {
    length_ = std::max<int64_t>(1, kPieceElements / width_);
    per_channel_ = (p.positions + length_ - 1) / length_;
    per_sample_ = per_channel_ * (p.rows() ? 1 : p.channels);
  }
  int64_t per_channel() const { return per_channel_; }
  int64_t per_sample() const { return per_sample_; }
  int64_t count() const { return per_sample_ * p_.samples(); }
  int64_t grain() const { return std::max<int64_t>(1, 2 * kParallelGrain / kPieceElements); }
  Piece at(int64_t index) const {
    const int64_t rest = index % per_sample_, first = rest % per_channel_ * length_;
    return {index / per_sample_, rest / per_channel_, first, std::min(length_, p_.positions - first)};
  }
  int64_t offset(const Piece& piece) const {
    return p_.offset(piece.sample) + piece.channel * p_.channel_stride + piece.first * p_.position_stride;
  }

 private:
  const GroupNormParams& p_;
  int64_t width_, length_, per_channel_, per_sample_;
};

template <typename T>
struct GroupKernel {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const GroupNormParams& p;
  Pieces pieces;
  int64_t per_group;            // channels of a group
  std::vector<A> weight, bias;  // padded to whole vectors, as all that is kept per channel

  explicit GroupKernel(const GroupNormParams& params)
      : p(params),
        pieces(params),
        per_group(params.channels / params.groups),
        weight(widened<A>({params.weight, params.weight_dtype}, params.channels, A(1))),
        bias(widened<A>({params.bias, params.bias_dtype}, params.channels, A(0))) {}

  // Of one group in one sample. What rounding `mean` leaves of the float64 mean would shift all values of the group the
  // same way, which sums over them (dbias) do not average out.
  struct Statistics {
    A mean;
    double rest, rstd;  // rest: the exact mean less `mean`
  };
  Statistics statistics_of(int64_t sample, int64_t group) const {
    const double mean = p.mean[sample * p.groups + group];
    const A rounded = static_cast<A>(mean);
    return {rounded, mean - static_cast<double>(rounded), p.rstd[sample * p.groups + group]};
  }

  // Per channel, so that z = (x - mean) * scale + shift.
  struct Coefficients {
    std::vector<A> mean, scale, shift;
    explicit Coefficients(int64_t size) : mean(size), scale(size), shift(size) {}
  };
  Coefficients coefficients() const { return Coefficients(p.channels + L); }
  void set_sample(Coefficients& k, int64_t sample) const {
    for (int64_t c = 0; c < p.channels; ++c) {
      const Statistics s = statistics_of(sample, c / per_group);
      const double scale = s.rstd * static_cast<double>(weight[c]);
      k.mean[c] = s.mean;
      k.scale[c] = static_cast<A>(scale);
      k.shift[c] = static_cast<A>(static_cast<double>(bias[c]) - s.rest * scale);
    }
  }

  template <typename F>
  void with_ending(const F& f) const {
    vidkernels::with_ending<A>(p.silu, keeps_finite(weight.data(), bias.data(), p.channels), f);
  }

  // f(piece, coefficients of its sample) over all pieces, in parallel.
  template <typename F>
  void for_pieces(const F& f) const {
    parallel_for(0, pieces.count(), pieces.grain(), [&](int64_t begin, int64_t end) {
      Coefficients k = coefficients();
      int64_t sample = -1;
      for (int64_t i = begin; i < end; ++i) {
        const Piece piece = pieces.at(i);
        if (piece.sample != sample) set_sample(k, sample = piece.sample);
        f(i, piece, k);
      }
    });
  }
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
