// SPDX-License-Identifier: Apache-2.0
// The channel norm where the channels of a position are adjacent (NDHWC): blocks of rows side by side, so that no row
// waits for the sums of another; what the forward and the backward share.
#pragma once

#include "channel_norm/channel_norm_rows.h"
#include "common/pack.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

// Rows of a block, each with two chains of sums: what the registers hold. With 4 rows of float32 the prefetcher of the
// processor loses track beyond the caches: a backward of 128 channels takes 0.65 ms, not 0.5. Within, 4 win 13 %.
#if defined(__AVX512F__)
template <typename T>
constexpr int kRowsPerBlock = sizeof(T) == 2 ? 4 : 2;
#else
template <typename T>
constexpr int kRowsPerBlock = 2;
#endif
// Longer rows go one by one: a block stays in the level 1 cache.
constexpr int64_t kBlockedRowBytes = 4096;
// Packs after which float32 sums over a row begin anew: long chains lose digits.
constexpr int64_t kPacksPerSum = 32;

template <typename T>
struct RowKernel {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  static constexpr int N = kPack<T>;

  const ChannelNormParams& p;
  VectorBuffer<A> weight, bias;  // in the order of packs, zeros behind the row's end
  int64_t whole;                 // elements of a row in whole packs
  int tail;
  V live[2];    // 1 in the lanes of the last, partial pack that hold elements
  bool finite;  // see keeps_finite

  explicit RowKernel(const ChannelNormParams& params)
      : p(params),
        weight(params.layout.channels + N),
        bias(params.layout.channels + N),
        whole(params.layout.channels / N * N),
        tail(static_cast<int>(params.layout.channels % N)) {
    A ones[N] = {};
    for (int i = 0; i < tail; ++i) ones[place_in_pack<T>(i)] = A(1);
    for (int i = 0; i < 2; ++i) live[i] = load_vec(ones + i * L);
    place(p.weight, A(1), weight.data());
    place(p.bias, A(0), bias.data());
    finite = keeps_finite(weight.data(), bias.data(), params.layout.channels + N);
  }

  // f(c, last) for every pack of a row; `last` (a std::true_type) is the partial one at its end.
  template <typename F>
  VK_ALWAYS_INLINE void for_packs(int64_t begin, int64_t end, const F& f) const {
    const int64_t stop = std::min(end, whole);
    for (int64_t c = begin; c < stop; c += N) f(c, std::false_type{});
    if (end > whole && tail != 0) f(whole, std::true_type{});
  }
  template <typename F>
  VK_ALWAYS_INLINE void for_packs(const F& f) const {
    for_packs(0, p.layout.channels, f);
  }
  template <typename Last>
  VK_ALWAYS_INLINE Pack<T> load(const T* from, Last) const {
    return Last::value ? load_pack_part<T>(from, tail) : load_pack<T>(from);
  }
  template <typename Last>
  VK_ALWAYS_INLINE void store(T* to, const Pack<T>& pack, Last) const {
    Last::value ? store_pack_part<T>(to, pack, tail) : store_pack<T>(to, pack);
  }

  // Sums over R rows of x - mean, and of its square if kSquares.
  template <int R, bool kSquares>
  VK_ALWAYS_INLINE void sum_rows(const T* x, int64_t step, const A (&mean)[R], A (&first)[R], A (&second)[R]) const {
    for (int r = 0; r < R; ++r) first[r] = second[r] = A(0);
    for (int64_t begin = 0; begin < p.layout.channels; begin += kPacksPerSum * N) {
      V sums[R][2] = {}, squares[R][2] = {};
      for_packs(begin, begin + kPacksPerSum * N, [&](int64_t c, auto last) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          const Pack<T> values = load(x + r * step + c, last);
          for (int i = 0; i < 2; ++i) {
            V d = values.v[i] - mean[r];
            if (last.value) d *= live[i];
            sums[r][i] += d;
            if (kSquares) squares[r][i] += d * d;
          }
        }
      });
      for (int r = 0; r < R; ++r) {
        first[r] += sum_lanes<A>(sums[r][0] + sums[r][1]);
        if (kSquares) second[r] += sum_lanes<A>(squares[r][0] + squares[r][1]);
      }
    }
  }

  // Mean (0 but for layer) and the sum of squares about it, of R rows.
  template <int R>
  VK_ALWAYS_INLINE void two_passes(const T* x, int64_t step, A (&mean)[R], A (&squares)[R]) const {
    const A count = static_cast<A>(p.layout.channels);
    A sums[R], none[R];
    for (int r = 0; r < R; ++r) mean[r] = A(0);
    if (p.kind == NormKind::layer) {
      sum_rows<R, false>(x, step, mean, sums, none);
      for (int r = 0; r < R; ++r) mean[r] = sums[r] / count;
    }
    sum_rows<R, true>(x, step, mean, sums, squares);
    if (p.kind == NormKind::layer) {
      for (int r = 0; r < R; ++r) {
        squares[r] -= sums[r] * sums[r] / count;
        mean[r] += sums[r] / count;
      }
    }
  }

#if defined(__AVX512BF16__)
  // The same in one pass: squares of bfloat16 are exact in float32, and an instruction adds two of them. A row whose
  // mean is so far from zero that digits would be lost, or whose squares are near the ends of float32, takes two.
  template <int R>
  VK_ALWAYS_INLINE void one_pass(const T* x, int64_t step, float (&mean)[R], float (&squares)[R]) const {
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
    const auto live_tail = static_cast<__mmask32>((1ull << tail) - 1);
    __m512 sum[R], square[R];
    for (int r = 0; r < R; ++r) sum[r] = square[r] = _mm512_setzero_ps();
    for_packs([&](int64_t c, auto last) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) {
        const T* from = x + r * step + c;
        const __m512i bits = last.value ? _mm512_maskz_loadu_epi16(live_tail, from) : _mm512_loadu_si512(from);
        const __m512bh values = reinterpret_cast<__m512bh>(bits);
        sum[r] = _mm512_dpbf16_ps(sum[r], values, ones);
        square[r] = _mm512_dpbf16_ps(square[r], values, values);
      }
    });
    const double count = static_cast<double>(p.layout.channels);
    for (int r = 0; r < R; ++r) {
      const double total = sum_lanes<float>(reinterpret_cast<V>(square[r]));
      const double average = p.kind == NormKind::layer ? sum_lanes<float>(reinterpret_cast<V>(sum[r])) / count : 0.0;
      const double centred = total - average * average * count;
      mean[r] = static_cast<float>(average);
      squares[r] = static_cast<float>(centred);
      if (total > 1e-30 && total < 1e36 && total < 64 * centred) continue;
      float other_mean[1], other_squares[1];
      two_passes<1>(x + r * step, step, other_mean, other_squares);
      mean[r] = other_mean[0];
      squares[r] = other_squares[0];
    }
  }
#endif

  // Mean (0 but for layer) and rstd of R rows.
  template <int R>
  VK_ALWAYS_INLINE void statistics(const T* x, int64_t step, A (&mean)[R], A (&rstd)[R]) const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (p.layout.channels <= kPacksPerSum * N) {
        one_pass<R>(x, step, mean, rstd);
      } else {
        two_passes<R>(x, step, mean, rstd);
      }
    } else {
      two_passes<R>(x, step, mean, rstd);
    }
#else
    two_passes<R>(x, step, mean, rstd);
#endif
    scales_of<A>(p.kind, rstd, R, p.layout.channels, p.eps);
    for (int r = 0; r < R && std::is_same<A, float>::value; ++r) {
      if (usable(rstd[r])) continue;
      const Statistics<A> s = wide_statistics<A>(p.kind, x + r * step, 1, p.layout.channels, p.eps);
      mean[r] = s.mean, rstd[r] = s.rstd;
    }
  }

  // f(rows, offsets) over positions [begin, end): R rows one after the other in memory, R a std::integral_constant.
  template <typename F>
  VK_ALWAYS_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) const {
    const ChannelLayout& layout = p.layout;
    const bool blocked = layout.channels * static_cast<int64_t>(sizeof(T)) <= kBlockedRowBytes;
    const int64_t x_step = layout.x_stride[layout.dims - 1], y_step = layout.y_stride[layout.dims - 1];
    for_each_run(layout, begin, end, [&](Offsets at, int64_t count) __attribute__((always_inline)) {
      int64_t i = 0;
      for (; blocked && i + kRowsPerBlock<T> <= count; i += kRowsPerBlock<T>) {
        f(std::integral_constant<int, kRowsPerBlock<T>>{}, Offsets{at.x + i * x_step, at.y + i * y_step});
      }
      for (; i < count; ++i) f(std::integral_constant<int, 1>{}, Offsets{at.x + i * x_step, at.y + i * y_step});
    });
  }

  // The pack at `from` into the level 1 cache: rows that lie side by side in a block are not a stream to the processor.
  static VK_ALWAYS_INLINE void prefetch(const T* from) {
    __builtin_prefetch(from);
    if (N * sizeof(T) > 64) __builtin_prefetch(from + N / 2);
  }

  // f(the ending of this call as a std::integral_constant)
  template <typename F>
  void with_ending(const F& f) const {
    vidkernels::with_ending<A>(p.silu, finite, f);
  }

 private:
  // An affine parameter into the order of packs.
  void place(const Affine& affine, A missing, A* to) const {
    const std::vector<A> values = widened<A>(affine, p.layout.channels, missing);
    for (int64_t c = 0; c < p.layout.channels; ++c) to[place_in_pack<T>(c)] = values[c];
  }
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
