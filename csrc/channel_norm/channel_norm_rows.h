// SPDX-License-Identifier: Apache-2.0
// What the forward and backward CPU kernels of this folder share: walking over positions, affine parameters in the
// accumulation type, statistics.
//
// Variances are sums of squares of centred values: E[x^2] - E[x]^2 loses all digits where |mean| is large against the
// deviation. The pass that squares also sums the centred values, whose mean, in exact arithmetic 0, corrects both the
// mean and the sum of squares for the rounding of the first pass.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "channel_norm/channel_norm.h"
#include "channel_norm/wide_sums.h"
#include "common/sigmoid.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kParallelGrain = 16384;

struct Offsets {
  int64_t x, y;
};

// Offsets of the `index`-th combination of the first `dims` position axes.
inline Offsets offsets_of(const ChannelLayout& layout, int dims, int64_t index) {
  Offsets offsets{0, 0};
  for (int i = dims - 1; i >= 0; --i) {
    const int64_t at = index % layout.size[i];
    index /= layout.size[i];
    offsets.x += at * layout.x_stride[i];
    offsets.y += at * layout.y_stride[i];
  }
  return offsets;
}

// f(offsets, count) for runs of positions [begin, end) that differ only in the innermost axis.
template <typename F>
inline void for_each_run(const ChannelLayout& layout, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t count = std::min(end - begin, layout.inner() - begin % layout.inner());
    f(offsets_of(layout, layout.dims, begin), count);
    begin += count;
  }
}

template <typename A, typename T>
inline void widen(const void* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(to_float(static_cast<const T*>(from)[i]));
}

// An affine parameter in the accumulation type, or `missing` repeated; zeros up to a multiple of the vector length.
template <typename A>
inline std::vector<A> widened(const Affine& affine, int64_t channels, A missing) {
  std::vector<A> values(channels + kLanes<A>, A(0));
  if (affine.data == nullptr) {
    std::fill_n(values.begin(), channels, missing);
    return values;
  }
  VK_DISPATCH_FLOATING(affine.dtype, ([&] { widen<A, scalar_t>(affine.data, channels, values.data()); }));
  return values;
}

// What follows the norm. silu_finite: where no value but NaN can reach kSigmoidLimit.
enum class Ending { none, silu, silu_finite };

// Whether these affine parameters leave normed values, which are below sqrt(C), under kSigmoidLimit.
template <typename A>
inline bool keeps_finite(const A* weight, const A* bias, int64_t count) {
  const A limit = static_cast<A>(kSigmoidLimit / 1e6);
  bool small = true;
  for (int64_t c = 0; c < count; ++c) small = small && std::abs(weight[c]) <= limit && std::abs(bias[c]) <= limit;
  return small;
}

// f(the ending as a std::integral_constant)
template <typename A, typename F>
inline void with_ending(bool silu, bool finite, const F& f) {
  if (!silu) return f(std::integral_constant<Ending, Ending::none>{});
  if constexpr (kHasFiniteSigmoid<A>) {
    if (finite) return f(std::integral_constant<Ending, Ending::silu_finite>{});
  }
  f(std::integral_constant<Ending, Ending::silu>{});
}

template <typename A, Ending kEnding>
VK_ALWAYS_INLINE Vec<A> ended(Vec<A> z) {
  return kEnding == Ending::none ? z : kEnding == Ending::silu ? silu<A>(z) : silu_finite<A>(z);
}
// The same for results that are stored as T.
template <typename T, Ending kEnding>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> ended_as(Vec<accumulate_t<T>> z) {
  constexpr bool coarse = std::is_same<T, bfloat16>::value && kEnding == Ending::silu_finite;
  return coarse ? silu_to_bfloat16<accumulate_t<T>>(z) : ended<accumulate_t<T>, kEnding>(z);
}
// dz from dy and z
template <typename A, Ending kEnding, bool kSummed = false>
VK_ALWAYS_INLINE Vec<A> through(Vec<A> dy, Vec<A> z) {
  if (kEnding == Ending::none) return dy;
  const Sigmoid<A> s = kEnding == Ending::silu ? sigmoid_pair<A>(z) : sigmoid_pair_finite<A>(z);
  return dy * (kSummed ? silu_slope_to_sum<A>(z, s) : silu_slope<A>(z, s));
}

// One element of an affine parameter's gradient.
inline void store_affine(void* to, DType dtype, int64_t at, double value) {
  VK_DISPATCH_FLOATING(dtype, [&] {
    static_cast<scalar_t*>(to)[at] = from_float<scalar_t>(static_cast<accumulate_t<scalar_t>>(value));
  });
}

// In place, sum((x - mean)^2) of `count` positions into rstd, rounded once: all values of a position are off by what it
// is off by.
template <typename A>
VK_ALWAYS_INLINE void scales_of(NormKind kind, A* values, int count, int64_t channels, double eps) {
  const double size = static_cast<double>(channels);
  if (kind == NormKind::l2) {
    for (int i = 0; i < count; ++i) {
      const double length = std::sqrt(static_cast<double>(values[i]));
      values[i] = static_cast<A>(std::sqrt(size) / (length < eps ? eps : length));
    }
  } else {
    for (int i = 0; i < count; ++i) {
      values[i] = static_cast<A>(1 / std::sqrt(static_cast<double>(values[i]) / size + eps));
    }
  }
}

// Whether the l2 norm of a position is below eps, so that rstd, sqrt(C) / eps, does not depend on x.
template <typename A>
VK_ALWAYS_INLINE A fixed_scale(NormKind kind, int64_t channels, double eps) {
  return kind == NormKind::l2 ? static_cast<A>(std::sqrt(static_cast<double>(channels)) / eps)
                              : std::numeric_limits<A>::infinity();
}

template <typename A>
VK_ALWAYS_INLINE bool all_usable(const A* scales, int count) {
  bool all = true;
  for (int i = 0; i < count; ++i) all &= usable(scales[i]);
  return all;
}

// 1 in the first `count` lanes, 0 in the others.
template <typename A>
VK_ALWAYS_INLINE Vec<A> lane_flags(int count) {
  A lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i < count ? A(1) : A(0);
  return load_vec(lanes);
}

// Channels after which sums over a tile begin anew: 256 squares in one chain cost three roundings of rstd.
constexpr int64_t kChannelsPerSum = 32;

// The same for a tile of N vectors of positions in `buffer` ([channels][N] vectors) whose sums over the channels are
// known, and with rstd instead of the sum of squares.
template <typename A, int N>
VK_ALWAYS_INLINE void tile_statistics(NormKind kind, const A* buffer, int64_t channels, double eps,
                                      const Vec<A> (&sum)[N], Vec<A> (&mean)[N], Vec<A> (&rstd)[N]) {
  constexpr int L = kLanes<A>;
  const A count = static_cast<A>(channels);
  const bool centred = kind == NormKind::layer;
  Vec<A> rest[N] = {}, squares[N] = {};
  for (int v = 0; v < N; ++v) mean[v] = centred ? sum[v] / count : Vec<A>{};
  for (int64_t begin = 0; begin < channels; begin += kChannelsPerSum) {
    Vec<A> near_rest[N] = {}, near_squares[N] = {};
    for (int64_t c = begin; c < std::min(channels, begin + kChannelsPerSum); ++c) {
      for (int v = 0; v < N; ++v) {
        const Vec<A> d = load_vec(buffer + (c * N + v) * L) - mean[v];
        near_rest[v] += d;
        near_squares[v] += d * d;
      }
    }
    for (int v = 0; v < N; ++v) {
      rest[v] += near_rest[v];
      squares[v] += near_squares[v];
    }
  }
  A scales[N * L];
  for (int v = 0; v < N; ++v) {
    if (centred) {
      squares[v] -= rest[v] * rest[v] / count;
      mean[v] += rest[v] / count;
    }
    store_vec(scales + v * L, squares[v]);
  }
  scales_of<A>(kind, scales, N * L, channels, eps);
  if (std::is_same<A, float>::value && !all_usable(scales, N * L)) {
    A means[N * L];
    for (int v = 0; v < N; ++v) store_vec(means + v * L, mean[v]);
    for (int i = 0; i < N * L; ++i) {
      if (usable(scales[i])) continue;
      const Statistics<A> s = wide_statistics<A>(kind, buffer + i, N * L, channels, eps);
      means[i] = s.mean, scales[i] = s.rstd;
    }
    for (int v = 0; v < N; ++v) mean[v] = load_vec(means + v * L);
  }
  for (int v = 0; v < N; ++v) rstd[v] = load_vec(scales + v * L);
}

// Where positions are adjacent: one tile of up to kTileVectors vectors of them, through all channels.
constexpr int kTileVectors = 4;

struct TileShape {
  int vectors;         // vectors per channel
  int last;            // lanes used of the last vector
  int64_t whole_rows;  // channels, from the first on, whose last vector may be read and written whole
};

inline TileShape tile_shape(const ChannelLayout& layout, int64_t count, int lanes) {
  TileShape shape{static_cast<int>((count + lanes - 1) / lanes), static_cast<int>((count - 1) % lanes + 1), 0};
  if (shape.last == lanes) {
    shape.whole_rows = layout.channels;
  } else if (count == layout.inner() && layout.x_channel == count && layout.y_channel == count) {
    // Channels follow each other without a gap, so what a whole vector reads or spoils behind a row belongs to the next
    // rows, which are written later; only at the end of the last row there is none.
    const int64_t spoilt = shape.vectors * lanes - count;
    shape.whole_rows = std::max<int64_t>(0, layout.channels - (spoilt + count - 1) / count);
  }
  return shape;
}

// f(N) with a tile's number of vectors as a compile-time constant.
template <typename F>
inline void with_vectors(int vectors, const F& f) {
  static_assert(kTileVectors == 4, "one case per number of vectors");
  switch (vectors) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

// Tiles of a layout; `f(offsets, shape)` for those numbered [begin, end).
template <typename A>
class Tiles {
 public:
  static constexpr int64_t kWidth = kTileVectors * kLanes<A>;

  explicit Tiles(const ChannelLayout& layout)
      : layout_(layout), inner_(layout.inner()), per_plane_((layout.inner() + kWidth - 1) / kWidth) {}

  int64_t count() const { return layout_.positions() / inner_ * per_plane_; }
  int64_t size() const { return layout_.channels * std::min(kWidth, inner_); }

  template <typename F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % per_plane_ * kWidth;
      Offsets at = offsets_of(layout_, layout_.dims - 1, unit / per_plane_);
      at.x += first;
      at.y += first;
      f(at, tile_shape(layout_, std::min(kWidth, inner_ - first), kLanes<A>));
    }
  }

 private:
  const ChannelLayout& layout_;
  int64_t inner_, per_plane_;
};

// Room for `count` values, aligned to whole vectors.
template <typename A>
class VectorBuffer {
 public:
  explicit VectorBuffer(int64_t count) : storage_(count + kLanes<A>) {}
  const A* data() const { return const_cast<VectorBuffer*>(this)->data(); }
  A* data() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<A*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }

 private:
  std::vector<A> storage_;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
