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
  int64_t per_group;  // channels of a group

  explicit GroupKernel(const GroupNormParams& params)
      : p(params), pieces(params), per_group(params.channels / params.groups) {}

  A mean_of(int64_t sample, int64_t channel) const {
    return static_cast<const A*>(p.mean)[sample * p.groups + channel / per_group];
  }
  A rstd_of(int64_t sample, int64_t channel) const {
    return static_cast<const A*>(p.rstd)[sample * p.groups + channel / per_group];
  }

  // Per channel: mean, rstd of its group, weight, bias and rstd * weight, padded to whole vectors.
  struct Coefficients {
    std::vector<A> mean, rstd, weight, bias, scale;
  };
  Coefficients coefficients() const {
    return {std::vector<A>(p.channels + L), std::vector<A>(p.channels + L),
            widened<A>({p.weight, p.weight_dtype}, p.channels, A(1)),
            widened<A>({p.bias, p.bias_dtype}, p.channels, A(0)), std::vector<A>(p.channels + L)};
  }
  template <typename F>
  void with_ending(const F& f) const {
    const Coefficients k = coefficients();
    vidkernels::with_ending<A>(p.silu, keeps_finite(k.weight.data(), k.bias.data(), p.channels), f);
  }
  void set_sample(Coefficients& c, int64_t sample) const {
    for (int64_t i = 0; i < p.channels; ++i) {
      c.mean[i] = mean_of(sample, i);
      c.rstd[i] = rstd_of(sample, i);
      c.scale[i] = c.rstd[i] * c.weight[i];
    }
  }

  // f(load, c) over the channels of a row in vectors; `load` gives the values at c, zeros behind the row's end.
  template <typename F>
  VK_ALWAYS_INLINE void for_row(const T* row, const F& f) const {
    const int64_t whole = p.channels / L * L;
    const int tail = static_cast<int>(p.channels - whole);
    for (int64_t c = 0; c < whole; c += L) f([=] { return load_vec(row + c); }, c);
    if (tail != 0) f([=] { return load_part(row + whole, tail); }, whole);
  }

  // f(values of x, values of dy, c) over the channels of a row in vectors, zeros behind the row's end.
  template <typename F>
  VK_ALWAYS_INLINE void for_rows(const T* x, const T* dy, const F& f) const {
    const int64_t whole = p.channels / L * L;
    const int tail = static_cast<int>(p.channels - whole);
    for (int64_t c = 0; c < whole; c += L) f(load_vec(x + c), load_vec(dy + c), c);
    if (tail != 0) f(load_part(x + whole, tail), load_part(dy + whole, tail), whole);
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
