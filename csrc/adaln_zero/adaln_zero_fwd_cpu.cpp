// SPDX-License-Identifier: Apache-2.0
#include "adaln_zero/adaln_zero_cpu.h"

namespace vidkernels {
namespace adaln {
inline namespace VK_CPU_CAPABILITY {
namespace {

// Rows of this many bytes are taken in pairs: a row of modulation is loaded once for both, and while one row's sums
// wait for their last additions, the other's proceed (chain of 3072 and 5120 float32 from memory: 2.4 times a copy, one
// by one 2.6 to 3.3). Shorter rows share pages of memory, where two streams disturb each other (1152 bfloat16: 1.7
// times a copy in pairs, 1.0 one by one); there the next row is asked for instead.
constexpr int64_t kPairBytes = 8192;

// The rows of K consecutive tokens, and their statistics.
template <typename T, int K>
struct Tokens {
  using A = accumulate_t<T>;
  const T *x[K], *branch[K];
  T *hidden[K], *y[K];
  const T *next_x, *next_branch;  // of the token after these, which only a hint may look at
  Vec<A> mean[K], rstd[K];

  Tokens(const ForwardParams& p, int64_t token)
      : next_x(row_at<T>(p.x, token + K, p.channels)), next_branch(row_at<T>(p.branch, token + K, p.channels)) {
    for (int k = 0; k < K; ++k) {
      x[k] = row_at<T>(p.x, token + k, p.channels);
      branch[k] = row_at<T>(p.branch, token + k, p.channels);
      hidden[k] = row_at<T>(p.hidden, token + k, p.channels);
      y[k] = row_at<T>(p.y, token + k, p.channels);
      mean[k] = Vec<A>{};
      rstd[k] = broadcast<A>(1);
    }
  }

  VK_ALWAYS_INLINE void fetch_next(int64_t offset) const {
    if (K > 1) return;
    fetch(next_x + offset);
    if (next_branch != nullptr) fetch(next_branch + offset);
  }
};

template <typename A>
struct Moments {
  Total<A> sum, squares;
};

// Whether a row's sum and the sum of its squares cost one pass and two instructions per vector: processors with
// AVX512_BF16 multiply bfloat16 as it is and add two products at a time. Squares of bfloat16 are exact in float32.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool one_pass = std::is_same_v<T, bfloat16>;

VK_ALWAYS_INLINE void add_to(Moments<float>& moments, const bfloat16* from, Pair, int part) {
  __m512bh values;
  std::memcpy(&values, from, sizeof(values));
  const __m512bh ones = reinterpret_cast<__m512bh>(VecTraits<float>::bits{} + 0x3f803f80u);
  const auto add = [&](Vec<float>& sum, __m512bh factors) {
    sum = reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), values, factors));
  };
  add(moments.sum.part[part], ones);
  add(moments.squares.part[part], values);
}
#else
template <typename T>
constexpr bool one_pass = false;
#endif
template <typename T, typename Extent>
VK_ALWAYS_INLINE void add_to(Moments<accumulate_t<T>>& moments, const T* from, Extent extent, int part) {
  const auto value = load(from, extent);
  accumulate<accumulate_t<T>>(moments.sum.part[part], value);
  accumulate<accumulate_t<T>>(moments.squares.part[part], value * value);
}

// hidden = x + gate * branch, which takes the place of x.
template <bool with_moments, typename T, int K>
void gate_rows(Tokens<T, K>& t, const accumulate_t<T>* gate, Moments<accumulate_t<T>>* moments, int64_t channels) {
  for_row<T>(channels, [&](int64_t i, auto extent, int part) {
    const auto g = load(gate + i, extent);
    for (int k = 0; k < K; ++k) {
      store(t.hidden[k] + i, load(t.x[k] + i, extent) + g * load(t.branch[k] + i, extent), extent);
      if constexpr (with_moments) add_to(moments[k], t.hidden[k] + i, extent, part);
    }
  });
  for (int k = 0; k < K; ++k) t.x[k] = t.hidden[k];
}

// Row k's statistics from its sums. False where they would lose digits: the mean is far from zero in units of the
// standard deviation (their error grows by the square of that, to 64 roundings of float32 here), or squares are near
// the ends of float32.
template <typename T, int K>
bool statistics_of_moments(const ForwardParams& p, Tokens<T, K>& t, int k, const Moments<accumulate_t<T>>& moments) {
  using A = accumulate_t<T>;
  const double channels = static_cast<double>(p.channels), square = moments.squares.sum() / channels;
  const double mean = p.norm == Norm::layer ? moments.sum.sum() / channels : 0;
  const double variance = square - mean * mean;
  if (!(square > 1e-30 && square < 1e36 && square < 64 * variance)) return false;
  t.mean[k] = broadcast<A>(static_cast<A>(mean));
  t.rstd[k] = broadcast<A>(static_cast<A>(1.0 / std::sqrt(variance + p.eps)));
  return true;
}

// Two passes over rows that sit in the first-level cache: the sum of squares is taken about the mean, so a large common
// offset costs no digits.
template <typename T, int K>
void statistics_in_two_passes(const ForwardParams& p, Tokens<T, K>& t) {
  using A = accumulate_t<T>;
  const double channels = static_cast<double>(p.channels);
  if (p.norm == Norm::layer) {
    Total<A> total[K];
    for_row<T>(p.channels, [&](int64_t i, auto extent, int part) {
      for (int k = 0; k < K; ++k) accumulate<A>(total[k].part[part], load(t.x[k] + i, extent));
    });
    for (int k = 0; k < K; ++k) t.mean[k] = broadcast<A>(static_cast<A>(total[k].sum() / channels));
  }
  Total<A> squares[K];
  for_row<T>(p.channels, [&](int64_t i, auto extent, int part) {
    for (int k = 0; k < K; ++k) {
      if constexpr (!one_pass<T>) t.fetch_next(i);
      const auto d = keep(load(t.x[k] + i, extent) - all<A>(t.mean[k], extent), extent);
      accumulate<A>(squares[k].part[part], d * d);
    }
  });
  for (int k = 0; k < K; ++k) {
    t.rstd[k] = broadcast<A>(static_cast<A>(1.0 / std::sqrt(squares[k].sum() / channels + p.eps)));
  }
}

// The statistics of a row do not depend on the rows beside it.
template <typename T, int K>
void row_statistics(const ForwardParams& p, Tokens<T, K>& t, int64_t token, Moments<accumulate_t<T>>* moments) {
  using A = accumulate_t<T>;
  if (p.norm == Norm::none) return;
  if constexpr (one_pass<T>) {
    for_row<T>(p.branch == nullptr ? p.channels : 0, [&](int64_t i, auto extent, int part) {
      for (int k = 0; k < K; ++k) add_to(moments[k], t.x[k] + i, extent, part);
    });
    for (int k = 0; k < K; ++k) {
      if (statistics_of_moments(p, t, k, moments[k])) continue;
      Tokens<T, 1> alone(p, token + k);
      alone.x[0] = t.x[k];
      statistics_in_two_passes(p, alone);
      t.mean[k] = alone.mean[0], t.rstd[k] = alone.rstd[0];
    }
  } else {
    statistics_in_two_passes(p, t);
  }
  for (int k = 0; k < K; ++k) {
    if (p.mean != nullptr) static_cast<A*>(p.mean)[token + k] = t.mean[k][0];
    if (p.rstd != nullptr) static_cast<A*>(p.rstd)[token + k] = t.rstd[k][0];
  }
}

template <typename T, int K>
void modulate_rows(const Tokens<T, K>& t, const accumulate_t<T>* a, const accumulate_t<T>* s, int64_t channels) {
  using A = accumulate_t<T>;
  for_row<T>(channels, [&](int64_t i, auto extent, int) {
    const auto factor = load(a + i, extent), offset = load(s + i, extent);
    for (int k = 0; k < K; ++k) {
      if constexpr (one_pass<T>) t.fetch_next(i);
      const auto xhat = (load(t.x[k] + i, extent) - all<A>(t.mean[k], extent)) * all<A>(t.rstd[k], extent);
      store(t.y[k] + i, xhat * factor + offset, extent);
    }
  });
}

// Rows of modulation: a and s of fold, and gate.
template <typename A>
struct Modulation {
  const A *a, *s, *gate;
};

template <typename T, int K>
void forward_tokens(const ForwardParams& p, int64_t token, const Modulation<accumulate_t<T>>& m) {
  Tokens<T, K> tokens(p, token);
  Moments<accumulate_t<T>> moments[K];
  if (p.branch != nullptr && p.y != nullptr) {
    gate_rows<one_pass<T>>(tokens, m.gate, moments, p.channels);
  } else if (p.branch != nullptr) {
    gate_rows<false>(tokens, m.gate, moments, p.channels);
  }
  if (p.y == nullptr) return;
  row_statistics(p, tokens, token, moments);
  modulate_rows(tokens, m.a, m.s, p.channels);
}

template <typename T>
void forward_range(const ForwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t channels = p.channels;
  const Buffer<A> buffer(4 * channels);
  A *factor = buffer.data(), *a = factor + channels, *s = a + channels, *gate = s + channels;
  for (int64_t token = begin; token < end;) {
    const int64_t row = row_of(p.rows, token);
    int64_t stop = run_end(p.rows, token, row, p.tokens);
    stop = stop < end ? stop : end;
    if (p.y != nullptr) fold(factor, a, s, p.scale, p.shift, p.weight, p.bias, row, channels);
    if (p.branch != nullptr) widen(gate, p.gate, row, channels, A(1));
    if (p.y != nullptr) arrange<T>(a, channels), arrange<T>(s, channels);
    if (p.branch != nullptr) arrange<T>(gate, channels);
    const Modulation<A> modulation{a, s, gate};
    const int64_t pairs_end = channels * static_cast<int64_t>(sizeof(T)) >= kPairBytes ? stop : token;
    for (; token + 2 <= pairs_end; token += 2) forward_tokens<T, 2>(p, token, modulation);
    for (; token < stop; ++token) forward_tokens<T, 1>(p, token, modulation);
  }
}

}  // namespace
}  // namespace VK_CPU_CAPABILITY
}  // namespace adaln

namespace VK_CPU_CAPABILITY {

void adaln_forward(const adaln::ForwardParams& params) {
  const int64_t grain = 1 + 32768 / (params.channels + 1);  // about 64 KB of bfloat16: far above the cost of a task
  VK_DISPATCH_FLOATING(params.dtype, ([&] {
                         parallel_for(0, params.tokens, grain, [&](int64_t begin, int64_t end) {
                           adaln::forward_range<scalar_t>(params, begin, end);
                         });
                       }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
