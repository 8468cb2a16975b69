// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "common/vmath.h"
#include "fsq/fsq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int kRunTokens = 16;
constexpr int64_t kBlock = 1024;
constexpr int64_t kGrain = 8192;

// 1 - tanh^2(u) = 2 h - h^2 with h = 1 - tanh |u| = 2 e / (1 + e), e = exp(-2 |u|). Near zero, where h is 1, an error
// of h cancels; far away, where the difference of 1 and tanh^2 would cancel, nothing is subtracted from h but its
// square.
template <typename A, bool hard_clamp>
VK_ALWAYS_INLINE Vec<A> squash_slope(Vec<A> u) {
  const Vec<A> size = u < A(0) ? -u : u;
  if (hard_clamp) return size <= A(1) ? broadcast<A>(1) : (size == size ? Vec<A>{} : size);
  const Vec<A> e = exp_nonpositive(A(-2) * size);
  const Vec<A> h = (e + e) / (A(1) + e);
  const Vec<A> slope = (h + h) - h * h;
  return size == size ? slope : size;
}

template <bool hard_clamp, typename T>
VK_ALWAYS_INLINE Vec<accumulate_t<T>> gradient(const T* z, const T* dcodes, Vec<accumulate_t<T>> shift,
                                               Vec<accumulate_t<T>> slope) {
  return load_vec(dcodes) * slope * squash_slope<accumulate_t<T>, hard_clamp>(load_vec(z) + shift);
}

template <typename T, bool hard_clamp>
void planar(const FsqBwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock, channels = layout.channels * layout.codebooks;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(layout.inner, kBlock));
  parallel_for(0, layout.outer * channels * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, c = task / blocks % channels, outer = task / blocks / channels;
      const int64_t n = std::min(kBlock, layout.inner - first);
      const auto at = [&](int which) {
        return layout.offset(which, outer, first, 0) + c * layout.operand[which].channel;
      };
      const T* z = static_cast<const T*>(p.z) + at(0);
      const T* dcodes = static_cast<const T*>(p.dcodes) + at(1);
      T* dz = static_cast<T*>(p.dz) + at(2);
      const Vec<A> shift = broadcast<A>(static_cast<A>(p.shift[c % layout.channels]));
      const Vec<A> slope = broadcast<A>(static_cast<A>(p.slope[c % layout.channels]));
      int64_t i = 0;
      for (; i + kLanes<A> <= n; i += kLanes<A>) {
        store_vec(dz + i, gradient<hard_clamp>(z + i, dcodes + i, shift, slope));
      }
      if (i == n) continue;
      const int rest = static_cast<int>(n - i);
      T ends[2][kLanes<A>] = {};
      std::copy_n(z + i, rest, ends[0]);
      std::copy_n(dcodes + i, rest, ends[1]);
      store_part(dz + i, gradient<hard_clamp>(ends[0], ends[1], shift, slope), rest);
    }
  });
}

// Runs of 16 tokens, or copies of such runs where the strides are unusual.
template <typename T, bool hard_clamp>
void runs(const FsqBwdParams& p, bool copy) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int64_t channels = layout.channels * layout.codebooks, length = kRunTokens * channels;
  std::vector<A> shift(length), slope(length);
  for (int64_t e = 0; e < length; ++e) {
    shift[e] = static_cast<A>(p.shift[e % layout.channels]);
    slope[e] = static_cast<A>(p.slope[e % layout.channels]);
  }
  const int64_t per_outer = (layout.inner + kRunTokens - 1) / kRunTokens;
  parallel_for(0, layout.outer * per_outer, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
    std::vector<T> padded(3 * length);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t outer = task / per_outer, first = task % per_outer * kRunTokens;
      const int64_t tokens = std::min<int64_t>(kRunTokens, layout.inner - first);
      const T* z = static_cast<const T*>(p.z) + layout.offset(0, outer, first, 0);
      const T* dcodes = static_cast<const T*>(p.dcodes) + layout.offset(1, outer, first, 0);
      T* dz = static_cast<T*>(p.dz) + layout.offset(2, outer, first, 0);
      const bool whole = !copy && tokens == kRunTokens;
      const auto each = [&](auto&& f) {
        for (int64_t e = 0; e < tokens * channels; ++e) f(e, e / channels, e % channels);
      };
      const auto at = [&](int which, int64_t t, int64_t c) {
        return t * layout.operand[which].inner + c * layout.operand[which].channel;
      };
      if (!whole) {
        each([&](int64_t e, int64_t t, int64_t c) {
          padded[e] = z[at(0, t, c)];
          padded[length + e] = dcodes[at(1, t, c)];
        });
      }
      const T* from = whole ? z : padded.data();
      const T* grads = whole ? dcodes : padded.data() + length;
      T* to = whole ? dz : padded.data() + 2 * length;
      for (int64_t e = 0; e < length; e += kLanes<A>) {
        store_vec(to + e, gradient<hard_clamp>(from + e, grads + e, load_vec(&shift[e]), load_vec(&slope[e])));
      }
      if (!whole) each([&](int64_t e, int64_t t, int64_t c) { dz[at(2, t, c)] = to[e]; });
    }
  });
}

template <typename T, bool hard_clamp>
void backward(const FsqBwdParams& p) {
  if (p.layout.interleaved(3)) return runs<T, hard_clamp>(p, false);
  if (p.layout.planar(3)) return planar<T, hard_clamp>(p);
  runs<T, hard_clamp>(p, true);
}

}  // namespace

void fsq_bwd(const FsqBwdParams& p) {
  VK_DISPATCH_FLOATING(p.dtype, ([&] {
                         if (p.hard_clamp) return backward<scalar_t, true>(p);
                         backward<scalar_t, false>(p);
                       }));
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
