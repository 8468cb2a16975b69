// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the channel norm share. Two families, by where a position's channels are:
//
//   rows    channels adjacent. A group of `lanes` threads of a warp owns a row, each thread ITERS vectors of it.
//   planes  positions adjacent. A block owns a tile of X * VEC positions; threads of one column own ITERS channels
//   each.
//
// Either way x stays in registers between the passes. ITERS = 0 is the form for sizes that do not fit: it reads x again
// for every pass, from the L1 or L2 cache.
#pragma once

#include "common/cuda.h"

#include "channel_norm/channel_norm.h"

namespace vidkernels {
namespace cuda {

constexpr int kNormThreads = 256;
// Sums of dweight and dbias are kept by at most this many blocks, whatever the device: results depend on shapes alone.
constexpr int64_t kNormMaxBlocks = 512;

template <typename A>
__device__ inline A affine_value(const Affine& affine, int64_t c, A missing) {
  switch (affine.data == nullptr ? DType::uint8 : affine.dtype) {
    case DType::float32:
      return static_cast<A>(static_cast<const float*>(affine.data)[c]);
    case DType::float64:
      return static_cast<A>(static_cast<const double*>(affine.data)[c]);
    case DType::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(affine.data)[c]);
    case DType::float16:
      return widen(static_cast<const __half*>(affine.data)[c]);
    default:
      return missing;
  }
}

// Of N channels from number `first` on; the type is looked at once.
template <typename A, int N>
__device__ inline void affine_values(const Affine& affine, int64_t first, A missing, A (&value)[N]) {
  const auto read = [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = static_cast<A>(widen(data[first + i]));
  };
  switch (affine.data == nullptr ? DType::uint8 : affine.dtype) {
    case DType::float32:
      return read(static_cast<const float*>(affine.data));
    case DType::float64:
      return read(static_cast<const double*>(affine.data));
    case DType::bfloat16:
      return read(static_cast<const __nv_bfloat16*>(affine.data));
    case DType::float16:
      return read(static_cast<const __half*>(affine.data));
    default:
      for (int i = 0; i < N; ++i) value[i] = missing;
  }
}

// Weight and bias of every channel in the accumulation type, in shared memory. Row vectors of 32 bytes and more are cut
// into pieces of 16, all first pieces before all second ones: neighbouring lanes then read neighbouring 16 bytes, where
// single floats 32 bytes apart would meet in 4 of the 32 banks.
template <typename A, int VEC>
struct StagedAffine {
  static constexpr int kPiece = VEC * sizeof(A) < 16 ? VEC : 16 / static_cast<int>(sizeof(A));
  using W = typename Word<kPiece * sizeof(A)>::type;
  A* shared;
  int64_t channels;

  static size_t bytes(int64_t channels) { return 2 * sizeof(A) * static_cast<size_t>(channels); }

  // A barrier must follow before the first read.
  __device__ void fill(const Affine& weight, const Affine& bias) const {
    for (int64_t c = threadIdx.x; c < channels; c += kNormThreads) {
      const int64_t vector = c / VEC, piece = c % VEC / kPiece;
      const int64_t at = (piece * (channels / VEC) + vector) * kPiece + c % kPiece;
      shared[at] = affine_value<A>(weight, c, A(1));
      shared[channels + at] = affine_value<A>(bias, c, A(0));
    }
  }

  __device__ void read(int64_t vector, A (&weight)[VEC], A (&bias)[VEC]) const {
#pragma unroll
    for (int v = 0; v < VEC; v += kPiece) {
      const A* from = shared + (v / kPiece * (channels / VEC) + vector) * kPiece;
      const W w = *reinterpret_cast<const W*>(from), b = *reinterpret_cast<const W*>(from + channels);
      memcpy(weight + v, &w, sizeof(w));
      memcpy(bias + v, &b, sizeof(b));
    }
  }
};

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
// x / y for 1 <= y <= 2, within 2 units of the last place: __fdividef takes 3 instructions more for tiny divisors.
__device__ inline float quotient(float x, float y) {
#if defined(VK_SIMT_SHIM)
  return x / y;
#else
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  return x * r;
#endif
}
__device__ inline double quotient(double x, double y) { return x / y; }

// 1 / (1 + exp(-z)) from the two approximations of the special function unit: 2^-21 relative where it matters, against
// 2^-12 of half a rounding of float16. Infinite exponentials give 0, which is right.
__device__ inline float quick_sigmoid(float z) {
#if defined(VK_SIMT_SHIM)
  return 1.0f / (1.0f + expf(-z));
#else
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
#endif
}

// z * sigmoid(z) for a result of type T. With values of 2 bytes, 8 to a vector, the exact form's 20 instructions a
// value were half of the kernel's and more than the memory leaves time for; this one has 5. The exact form: exp(-|z|)
// cannot overflow, so the fast quotient's divisor stays in [1, 2].
template <typename T, typename A>
__device__ inline A silu(A z) {
  if constexpr (sizeof(T) == 2) {
    return z * quick_sigmoid(z);
  } else {
    const A e = exp_of(z < 0 ? z : -z);
    return quotient(z < 0 ? z * e : z, A(1) + e);
  }
}

// d(z * sigmoid(z)) / dz = s + z * s * (1 - s).
template <typename T, typename A>
__device__ inline A silu_slope(A z) {
  if constexpr (sizeof(T) == 2) {
    const A s = quick_sigmoid(z);
    return s + z * s * (A(1) - s);
  } else {
    const A e = exp_of(z < 0 ? z : -z);
    const A large = quotient(A(1), A(1) + e), small = e * large;
    const A s = z < 0 ? small : large;
    return s + z * large * small;
  }
}

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// What every row's statistics need: quotients with slow paths, which the compiler does not move out of a loop by
// itself.
template <typename A>
struct NormConstants {
  A part, root_count = 0, most = 0;  // 1 / channels; for the l2 norm sqrt(channels), 1 / eps

  __device__ explicit NormConstants(const ChannelNormParams& p) : part(A(1) / static_cast<A>(p.layout.channels)) {
    if (p.kind != NormKind::l2) return;
    root_count = root(static_cast<A>(p.layout.channels));
    most = A(1) / static_cast<A>(p.eps);
  }
};

// rstd from the sum of squares, and whether it depends on x (an l2 norm below eps is replaced by eps).
template <typename A>
struct NormScale {
  A rstd;
  bool fixed;
};
template <typename A>
__device__ inline NormScale<A> norm_scale(const ChannelNormParams& p, const NormConstants<A>& constants, A square_sum) {
  if (p.kind != NormKind::l2) return {inverse_root(square_sum * constants.part + static_cast<A>(p.eps)), false};
  const A inverse = inverse_root(square_sum);
  const bool fixed = inverse > constants.most;
  return {constants.root_count * (fixed ? constants.most : inverse), fixed};
}

// dz and xhat of one element.
template <typename A>
struct Element {
  A dz, xhat;
};
template <typename T, typename A>
__device__ inline Element<A> element(A x, A dy, A mean, A rstd, A w, A b, bool silu_after) {
  const A xhat = (x - mean) * rstd;
  return {silu_after ? dy * silu_slope<T>(xhat * w + b) : dy, xhat};
}

// What dx needs besides g and xhat: dx = rstd * (g - shift - xhat * gx_mean). mean(xhat) is 0 but for the rounding of
// the mean; left in, rstd would magnify it where the variance is small.
template <typename A>
struct DxTerms {
  A shift, gx_mean;
};
template <typename A>
__device__ inline DxTerms<A> dx_terms(const ChannelNormParams& p, A part, A g_sum, A gx_sum, A x_sum, bool fixed) {
  const A gx_mean = fixed ? A(0) : gx_sum * part;
  return {p.kind == NormKind::layer ? (g_sum - gx_mean * x_sum) * part : A(0), gx_mean};
}

// Offsets of the `index`-th combination of the first `dims` position axes.
struct PositionOffsets {
  int64_t x, y;
};
__device__ inline PositionOffsets position_offsets(const ChannelLayout& layout, int dims, int64_t index) {
  if (dims == 1) return {index * layout.x_stride[0], index * layout.y_stride[0]};
  PositionOffsets at{0, 0};
  for (int i = dims - 1; i >= 0; --i) {
    const int64_t here = index % layout.size[i];
    index /= layout.size[i];
    at.x += here * layout.x_stride[i];
    at.y += here * layout.y_stride[i];
  }
  return at;
}

// Sum over groups of `lanes` neighbouring lanes, the same bits in each of them. Steps that a group has not are skipped
// rather than counted: a loop of run-time length takes 7 instructions a step.
template <typename A>
__device__ inline A group_sum(A value, int lanes) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < lanes) value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// What a rows kernel needs to know of its row: statistics in every lane of the group.
template <typename A>
struct RowStatistics {
  A mean, rstd;
  bool fixed;
};

// Vectors of a row that one thread holds: number `lane`, `lane + lanes`, ....
template <typename T, int VEC, int ITERS>
struct HeldRow {
  Pack<T, VEC> pack[ITERS];

  __device__ void load(const T* row, int lane, int lanes, int64_t vectors) {
#pragma unroll
    for (int i = 0; i < ITERS; ++i) {
      const int64_t at = lane + static_cast<int64_t>(i) * lanes;
      if (at < vectors) pack[i] = load_pack<VEC>(row + at * VEC);
    }
  }
  __device__ const Pack<T, VEC>& vector(const T*, int i, int64_t) const { return pack[i]; }
  static constexpr int kUnroll = ITERS;
  __device__ static int count(int, int64_t) { return ITERS; }
};
template <typename T, int VEC>
struct HeldRow<T, VEC, 0> {
  __device__ void load(const T*, int, int, int64_t) {}
  __device__ Pack<T, VEC> vector(const T* row, int, int64_t at) const { return load_pack<VEC>(row + at * VEC); }
  static constexpr int kUnroll = 1;
  __device__ static int count(int lanes, int64_t vectors) { return static_cast<int>((vectors + lanes - 1) / lanes); }
};

// f(pack, at) for a thread's vectors of a row; `at` is the vector's number in the row.
template <typename T, int VEC, int ITERS, typename F>
__device__ inline void for_row(const HeldRow<T, VEC, ITERS>& held, const T* row, int lane, int lanes, int64_t vectors,
                               bool active, const F& f) {
  const int count = HeldRow<T, VEC, ITERS>::count(lanes, vectors);
#pragma unroll(HeldRow<T, VEC, ITERS>::kUnroll)
  for (int i = 0; i < count; ++i) {
    const int64_t at = lane + static_cast<int64_t>(i) * lanes;
    if (active && at < vectors) f(held.vector(row, i, at), at, i);
  }
}

// Two passes, and the mean corrected by the mean of what is left after subtracting it (channel_norm_rows.h).
template <typename T, int VEC, int ITERS>
__device__ inline RowStatistics<accumulate_t<T>> row_statistics(const HeldRow<T, VEC, ITERS>& held, const T* row,
                                                                int lane, int lanes, int64_t vectors, bool active,
                                                                const ChannelNormParams& p,
                                                                const NormConstants<accumulate_t<T>>& constants) {
  using A = accumulate_t<T>;
  A mean = 0;
  if (p.kind == NormKind::layer) {
    A sum = 0;
    for_row<T, VEC, ITERS>(held, row, lane, lanes, vectors, active, [&](const Pack<T, VEC>& x, int64_t, int) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum += widen(x.value[v]);
    });
    mean = group_sum(sum, lanes) * constants.part;
  }
  A rest = 0, squares = 0;
  for_row<T, VEC, ITERS>(held, row, lane, lanes, vectors, active, [&](const Pack<T, VEC>& x, int64_t, int) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const A d = widen(x.value[v]) - mean;
      rest += d;
      squares += d * d;
    }
  });
  squares = group_sum(squares, lanes);
  if (p.kind == NormKind::layer) {
    rest = group_sum(rest, lanes);
    squares -= rest * rest * constants.part;
    mean += rest * constants.part;
  }
  const NormScale<A> scale = norm_scale(p, constants, squares);
  return {mean, scale.rstd, scale.fixed};
}

// How a rows kernel cuts the channels: `lanes` threads with `iters` vectors each (iters 0: as many as it takes). Fewest
// idle slots win, then fewest vectors a thread; but up to 4 of them are taken on `full_lanes` lanes or more, which read
// whole lines: as many loads on their way, and statistics and exchanges paid once for all of them.
struct RowShape {
  int lanes, iters;
};
inline RowShape row_shape(int64_t vectors, const int* choices, int count, int full_lanes) {
  RowShape best{32, 0};
  int64_t least = INT64_MAX;
  for (int i = 0; i < count; ++i) {
    for (int lanes = 4; lanes <= 32; lanes *= 2) {
      const int64_t room = static_cast<int64_t>(lanes) * choices[i];
      const bool as_good = room == least && choices[i] <= 4 && lanes >= full_lanes;
      if (room < vectors || (room >= least && !as_good)) continue;
      least = room;
      best = {lanes, choices[i]};
    }
  }
  return best;
}

// Whether rows (or planes) may be moved in vectors of `vec` elements wherever a kernel goes.
inline bool norm_vectors_fit(const ChannelLayout& layout, int64_t vec) {
  const int moving = layout.dims - 1;
  bool fits = (layout.rows ? layout.channels : layout.inner()) % vec == 0;
  if (!layout.rows) fits = fits && layout.x_channel % vec == 0 && layout.y_channel % vec == 0;
  for (int i = 0; i < layout.dims && fits; ++i) {
    if (!layout.rows && i == moving) continue;
    fits = layout.x_stride[i] % vec == 0 && layout.y_stride[i] % vec == 0;
  }
  return fits;
}

}  // namespace cuda
}  // namespace vidkernels
