// SPDX-License-Identifier: Apache-2.0
#include "causal_conv3d/sum_taps.h"

#include <algorithm>
#include <vector>

#include "causal_conv3d/matrix.h"
#include "common/pairs.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

// A block of filters and channels at a time: its taps are read once into the first cache, lanes are filters, and a unit
// [channels, filters] holds one tap. Stores are whole cache lines of bfloat16.
template <typename A>
class SumTaps {
 public:
  explicit SumTaps(const SumTapsParams& p) : p_(p), taps_(p.kernel[0] * p.kernel[1] * p.kernel[2]) {
    int64_t before = 1, sizes[3] = {p.kernel[0], p.kernel[1], p.kernel[2]};
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t after = axis == 0 ? sizes[1] * sizes[2] : axis == 1 ? sizes[2] : 1;
      units_ += p.rows[axis] == nullptr ? 0 : before * p.count[axis] * after;
      before *= p.count[axis];
    }
  }

  void run() const {
    const int64_t blocks = (p_.filters + kWide - 1) / kWide, chunks = (p_.channels + kChannels - 1) / kChannels;
    parallel_for(0, blocks * chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch((taps_ + units_) * kUnit);
      std::fill_n(scratch.get(), taps_ * kUnit, A(0));  // lanes beyond the last filter
      std::vector<const A*> units, next;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t filter = item / chunks * kWide, channel = item % chunks * kChannels;
        const int64_t filters = std::min(kWide, p_.filters - filter);
        const int64_t channels = std::min(kChannels, p_.channels - channel);
        VK_DISPATCH_FLOATING(p_.out_dtype, ([&] { prefetch<scalar_t>(filter, channel, channels); }));
        VK_DISPATCH_FLOATING(p_.dtype, ([&] { read<scalar_t>(filter, filters, channel, channels, scratch.get()); }));
        add_smooth(filter, filters, channel, channels, scratch.get());
        units.clear();
        for (int64_t tap = 0; tap < taps_; ++tap) units.push_back(scratch.get() + tap * kUnit);
        A* free = scratch.get() + taps_ * kUnit;
        for (int axis = 0; axis < 3; ++axis) {
          if (p_.rows[axis] == nullptr) continue;
          free = sum_axis(axis, units, channels, free, next);
          units.swap(next);
        }
        VK_DISPATCH_FLOATING(p_.out_dtype, ([&] { write<scalar_t>(units, filter, filters, channel, channels); }));
      }
    });
  }

 private:
  static constexpr int64_t L = kLanes<A>, kWide = 2 * L, kChannels = 16, kUnit = kChannels * kWide;

  struct Term {
    const A* unit;
    A factor;
  };

  template <typename W>
  void read(int64_t filter, int64_t filters, int64_t channel, int64_t channels, A* to) const {
    const int64_t* stride = p_.weight_stride;
    const W* from = static_cast<const W*>(p_.weight) + filter * stride[0] + channel * stride[1];
    const A share = static_cast<A>(p_.share);
    const bool along_taps = stride[4] == 1 && stride[3] == p_.kernel[2] && stride[2] == p_.kernel[1] * p_.kernel[2];
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float> && std::is_same_v<accumulate_t<W>, float>) {
      if (along_taps && stride[1] == taps_ && filters == kWide) {
        for (int64_t n = 0; n < kWide; n += L) read_transposed(from + n * stride[0], channels * taps_, share, to + n);
        return;
      }
    }
#endif
    if (!along_taps || taps_ == 1) return read_taps(from, filters, channels, share, to);
    for (int64_t n = 0; n < filters; ++n) {
      for (int64_t c = 0; c < channels; ++c) {  // their taps lie next to each other
        const W* at = from + n * stride[0] + c * stride[1];
        for (int64_t tap = 0; tap < taps_; ++tap) to[tap * kUnit + c * kWide + n] = value(at[tap], share);
      }
    }
  }

  void add_smooth(int64_t filter, int64_t filters, int64_t channel, int64_t channels, A* to) const {
    if (p_.smooth_tap < 0) return;
    for (int64_t n = 0; n < filters; ++n) {
      const int64_t c = filter + n - channel;
      if (c >= 0 && c < channels) to[p_.smooth_tap * kUnit + c * kWide + n] += static_cast<A>(p_.smooth);
    }
  }

#if defined(__AVX512F__)
  // Sixteen filters whose channels with their taps follow each other: 16 x 16 values at a time. Value by value 512 x
  // 512 x 27 of bfloat16 took twice as long.
  template <typename W>
  void read_transposed(const W* from, int64_t count, float share, float* to) const {
    int64_t tap = 0, c = 0;
    for (int64_t i = 0; i < count; i += L) {
      const int part = static_cast<int>(std::min(L, count - i));
      __m512i m[16];
      for (int64_t n = 0; n < L; ++n) {
        const W* at = from + n * p_.weight_stride[0] + i;
        m[n] = reinterpret_cast<__m512i>((part == L ? load_vec(at) : load_part(at, part)) * share);
      }
      transpose_pairs(m);
      for (int k = 0; k < part; ++k) {
        _mm512_storeu_si512(to + tap * kUnit + c * kWide, m[k]);
        if (++tap == taps_) tap = 0, ++c;
      }
    }
  }
#endif

  // Tap by tap, channels or filters next to each other.
  template <typename W>
  void read_taps(const W* from, int64_t filters, int64_t channels, A share, A* to) const {
    const int64_t* stride = p_.weight_stride;
    for (int64_t tap = 0; tap < taps_; ++tap, to += kUnit) {
      const int64_t t = tap / p_.kernel[2] / p_.kernel[1], h = tap / p_.kernel[2] % p_.kernel[1];
      const W* at = from + t * stride[2] + h * stride[3] + tap % p_.kernel[2] * stride[4];
      if (stride[0] == 1) {
        for (int64_t c = 0; c < channels; ++c, at += stride[1]) {
          for (int64_t n = 0; n < filters; ++n) to[c * kWide + n] = value(at[n], share);
        }
      } else {
        for (int64_t n = 0; n < filters; ++n, at += stride[0]) {
          for (int64_t c = 0; c < channels; ++c) to[c * kWide + n] = value(at[c * stride[1]], share);
        }
      }
    }
  }

  template <typename W>
  static VK_ALWAYS_INLINE A value(W stored, A share) {
    return static_cast<A>(to_float(stored)) * share;
  }

  // Units [before, kernel, after] become [before, count, after]. Returns where scratch is free behind them.
  A* sum_axis(int axis, const std::vector<const A*>& units, int64_t channels, A* free,
              std::vector<const A*>& made) const {
    int64_t after = 1;
    for (int i = axis + 1; i < 3; ++i) after *= p_.kernel[i];
    const int64_t kernel = p_.kernel[axis], before = static_cast<int64_t>(units.size()) / kernel / after;
    std::vector<Term> terms;
    made.clear();
    for (int64_t i = 0; i < before * p_.count[axis]; ++i) {
      const double* row = p_.rows[axis] + i % p_.count[axis] * kernel;
      for (int64_t j = 0; j < after; ++j) {
        terms.clear();
        for (int64_t k = 0; k < kernel; ++k) {
          if (row[k] != 0) {
            terms.push_back({units[(i / p_.count[axis] * kernel + k) * after + j], static_cast<A>(row[k])});
          }
        }
        if (terms.size() == 1 && terms[0].factor == A(1)) {
          made.push_back(terms[0].unit);
          continue;
        }
        switch (terms.size()) {
          case 2:
            add_terms<2>(terms.data(), 2, channels, free);
            break;
          case 3:
            add_terms<3>(terms.data(), 3, channels, free);
            break;
          default:
            add_terms<0>(terms.data(), static_cast<int>(terms.size()), channels, free);
        }
        made.push_back(free);
        free += kUnit;
      }
    }
    return free;
  }

  // N: how many, if known.
  template <int N>
  static void add_terms(const Term* terms, int count, int64_t channels, A* to) {
    for (int64_t i = 0; i < channels * kWide; i += L) {
      Vec<A> sum{};
#pragma GCC unroll 3
      for (int k = 0; k < (N > 0 ? N : count); ++k) sum += load_vec(terms[k].unit + i) * terms[k].factor;
      store_vec(to + i, sum);
    }
  }

  template <typename S>
  void write(const std::vector<const A*>& units, int64_t filter, int64_t filters, int64_t channel,
             int64_t channels) const {
    if constexpr (std::is_same_v<accumulate_t<S>, A>) {
      S* to = static_cast<S*>(p_.out) + filter + channel * p_.out_stride[1];
      for (int64_t tap = 0; tap < static_cast<int64_t>(units.size()); ++tap) {
        for (int64_t c = 0; c < channels; ++c) {
          const A* from = units[tap] + c * kWide;
          S* row = to + out_place(tap) + c * p_.out_stride[1];
          if (filters == kWide) {
            store_vec(row, load_vec(from));
            store_vec(row + L, load_vec(from + L));
          } else {
            store_part(row, load_vec(from), static_cast<int>(std::min(filters, L)));
            if (filters > L) store_part(row + L, load_vec(from + L), static_cast<int>(filters - L));
          }
        }
      }
    }
  }

  // Lines that will be written lie a tap, and rows of filters, apart: a third of the time would go into waiting for
  // them.
  template <typename S>
  void prefetch(int64_t filter, int64_t channel, int64_t channels) const {
    const S* to = static_cast<const S*>(p_.out) + filter + channel * p_.out_stride[1];
    for (int64_t tap = 0; tap < p_.count[0] * p_.count[1] * p_.count[2]; ++tap) {
      for (int64_t c = 0; c < channels; ++c) {
        const char* row = reinterpret_cast<const char*>(to + out_place(tap) + c * p_.out_stride[1]);
        for (int64_t byte = 0; byte < kWide * static_cast<int64_t>(sizeof(S)); byte += 64) {
          __builtin_prefetch(row + byte, 1, 2);
        }
      }
    }
  }

  int64_t out_place(int64_t tap) const {
    return tap / p_.count[2] / p_.count[1] * p_.out_stride[2] + tap / p_.count[2] % p_.count[1] * p_.out_stride[3] +
           tap % p_.count[2] * p_.out_stride[4];
  }

  const SumTapsParams& p_;
  const int64_t taps_;
  int64_t units_ = 0;
};

}  // namespace

void sum_taps(const SumTapsParams& params) {
  if (params.dtype == DType::float64) return SumTaps<double>(params).run();
  SumTaps<float>(params).run();
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
