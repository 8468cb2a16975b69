// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "common/vmath.h"
#include "lfq/lfq.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {
namespace {

constexpr int kRunTokens = 64;     // tokens of one interleaved step: their signs fill whole 64-bit words
constexpr int64_t kBlock = 1024;   // tokens of one planar step: values and index planes stay in the first cache
constexpr int64_t kGrain = 16384;  // elements per task: below 10 us a second thread costs more than it brings

template <typename A>
using VecInt = typename VecTraits<A>::integer;
template <typename A>
using UInt = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// Bit k of the result is set where lane k is positive.
template <typename A>
VK_ALWAYS_INLINE uint32_t positive_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_setzero_pd(), _CMP_GT_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(v > A(0))));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(v > A(0))));
  }
#else
  uint32_t lanes = 0;
  for (int k = 0; k < kLanes<A>; ++k) lanes |= static_cast<uint32_t>(v[k] > A(0)) << k;
  return lanes;
#endif
}

uint64_t reversed(uint64_t bits, int64_t count) {
  bits = __builtin_bswap64(bits);
  bits = (bits >> 4 & 0x0f0f0f0f0f0f0f0full) | (bits & 0x0f0f0f0f0f0f0f0full) << 4;
  bits = (bits >> 2 & 0x3333333333333333ull) | (bits & 0x3333333333333333ull) << 2;
  bits = (bits >> 1 & 0x5555555555555555ull) | (bits & 0x5555555555555555ull) << 1;
  return bits >> (64 - count);
}

template <typename A>
VK_ALWAYS_INLINE Vec<A> value_of(Vec<A> v, Vec<A> magnitude, bool additive) {
  const Vec<A> code = v > A(0) ? magnitude : -magnitude;
  return additive ? v + (code - v) : code;
}

// NDHWC and [tokens, channels]: the signs of a run are one string of bits, cut into tokens afterwards.

template <typename T>
void interleaved(const LfqFwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int64_t channels = layout.channels, length = kRunTokens * channels;
  const int64_t per_outer = layout.inner * layout.codebooks, runs = (per_outer + kRunTokens - 1) / kRunTokens;
  const Vec<A> magnitude = broadcast<A>(static_cast<A>(p.magnitude));
  const uint64_t mask = (uint64_t(1) << channels) - 1;
  parallel_for(0, layout.outer * runs, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
    std::vector<T> padded(2 * length);
    std::vector<uint64_t> words(channels + 1);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t outer = task / runs, first = task % runs * kRunTokens;
      const int64_t tokens = std::min<int64_t>(kRunTokens, per_outer - first);
      const T* x = static_cast<const T*>(p.x) + outer * layout.operand[0].outer + first * channels;
      T* values = p.values == nullptr ? nullptr
                                      : static_cast<T*>(p.values) + outer * layout.operand[1].outer + first * channels;
      const bool whole = tokens == kRunTokens;
      if (!whole) std::copy_n(x, tokens * channels, padded.data());
      const T* from = whole ? x : padded.data();
      T* to = whole || values == nullptr ? values : padded.data() + length;
      std::fill(words.begin(), words.end(), 0);
      for (int64_t e = 0; e < length; e += kLanes<A>) {
        const Vec<A> v = load_vec(from + e);
        words[e / 64] |= static_cast<uint64_t>(positive_lanes<A>(v)) << e % 64;
        if (to != nullptr) store_vec(to + e, value_of<A>(v, magnitude, p.additive));
      }
      if (!whole && values != nullptr) std::copy_n(to, tokens * channels, values);
      if (p.indices == nullptr) continue;
      int64_t* indices = p.indices + outer * per_outer + first;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t word = t * channels / 64, shift = t * channels % 64;
        const uint64_t bits = (words[word] >> shift | words[word + 1] << 1 << (63 - shift)) & mask;
        indices[t] = static_cast<int64_t>(p.lsb_first ? bits : reversed(bits, channels));
      }
    }
  });
}

// NCTHW: one channel after the other over a block of tokens.

template <typename T>
void planar_channel(const T* x, T* values, UInt<accumulate_t<T>>* plane, int64_t n, UInt<accumulate_t<T>> bit,
                    Vec<accumulate_t<T>> magnitude, bool additive) {
  using A = accumulate_t<T>;
  const auto step = [&](Vec<A> v, int64_t i) {
    VecInt<A> bits;
    std::memcpy(&bits, plane + i, sizeof(bits));
    bits |= (v > A(0)) & static_cast<std::make_signed_t<UInt<A>>>(bit);
    std::memcpy(plane + i, &bits, sizeof(bits));
    return value_of<A>(v, magnitude, additive);
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vec<A> value = step(load_vec(x + i), i);
    if (values != nullptr) store_vec(values + i, value);
  }
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  const Vec<A> value = step(load_part(x + i, rest), i);
  if (values != nullptr) store_part(values + i, value, rest);
}

template <typename T>
void planar(const LfqFwdParams& p) {
  using A = accumulate_t<T>;
  constexpr int kPlaneBits = 8 * sizeof(UInt<A>), kPlanes = 64 / kPlaneBits;
  const TokenLayout& layout = p.layout;
  const Vec<A> magnitude = broadcast<A>(static_cast<A>(p.magnitude));
  const int64_t blocks = (layout.inner + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(layout.inner, kBlock) * layout.channels));
  parallel_for(0, layout.outer * layout.codebooks * blocks, grain, [&](int64_t begin, int64_t end) {
    UInt<A> planes[kPlanes][kBlock + kLanes<A>];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, book = task / blocks % layout.codebooks;
      const int64_t outer = task / blocks / layout.codebooks, n = std::min(kBlock, layout.inner - first);
      const T* x = static_cast<const T*>(p.x) + layout.offset(0, outer, first, book);
      T* values = p.values == nullptr ? nullptr : static_cast<T*>(p.values) + layout.offset(1, outer, first, book);
      for (auto& plane : planes) std::fill_n(plane, n + kLanes<A>, UInt<A>(0));
      for (int64_t c = 0; c < layout.channels; ++c) {
        const int bit = lfq_bit(static_cast<int>(c), static_cast<int>(layout.channels), p.lsb_first);
        planar_channel<T>(x + c * layout.operand[0].channel,
                          values == nullptr ? nullptr : values + c * layout.operand[1].channel,
                          planes[bit / kPlaneBits], n, UInt<A>(1) << bit % kPlaneBits, magnitude, p.additive);
      }
      if (p.indices == nullptr) continue;
      int64_t* indices = p.indices + (outer * layout.inner + first) * layout.codebooks + book;
      for (int64_t i = 0; i < n; ++i) {
        uint64_t index = planes[0][i];
        for (int k = 1; k < kPlanes; ++k) index |= static_cast<uint64_t>(planes[k][i]) << (k * kPlaneBits % 64);
        indices[i * layout.codebooks] = static_cast<int64_t>(index);
      }
    }
  });
}

// Any strides, and the sphere, which needs the norm of a token before its signs.

template <typename T>
void strided(const LfqFwdParams& p) {
  using A = accumulate_t<T>;
  const TokenLayout& layout = p.layout;
  const int channels = static_cast<int>(layout.channels);
  const A magnitude = static_cast<A>(p.magnitude), scale = static_cast<A>(p.scale);
  const int64_t grain = std::max<int64_t>(1, kGrain / 8 / (layout.codebooks * layout.channels));
  parallel_for(0, layout.tokens(), grain, [&](int64_t begin, int64_t end) {
    A u[kLfqMaxBits + 2];
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t book = 0; book < layout.codebooks; ++book) {
        const T* x = static_cast<const T*>(p.x) + layout.offset(0, token / layout.inner, token % layout.inner, book);
        A square = 0;
        for (int c = 0; c < channels; ++c) {
          u[c] = to_float(x[c * layout.operand[0].channel]);
          square += u[c] * u[c];
        }
        if (p.spherical) {
          const A norm = std::max(std::sqrt(square), static_cast<A>(kLfqNormFloor));
          for (int c = 0; c < channels; ++c) u[c] = u[c] / norm * scale;
        }
        uint64_t index = 0;
        for (int c = 0; c < channels; ++c) {
          index |= static_cast<uint64_t>(u[c] > A(0)) << lfq_bit(c, channels, p.lsb_first);
        }
        if (p.indices != nullptr) p.indices[token * layout.codebooks + book] = static_cast<int64_t>(index);
        if (p.values == nullptr) continue;
        T* values = static_cast<T*>(p.values) + layout.offset(1, token / layout.inner, token % layout.inner, book);
        for (int c = 0; c < channels; ++c) {
          const A code = u[c] > A(0) ? magnitude : -magnitude;
          values[c * layout.operand[1].channel] = from_float<T>(p.additive ? u[c] + (code - u[c]) : code);
        }
      }
    }
  });
}

}  // namespace

void lfq_fwd(const LfqFwdParams& p) {
  const int operands = p.values == nullptr ? 1 : 2;
  VK_DISPATCH_FLOATING(p.dtype, [&] {
    if (p.spherical) return strided<scalar_t>(p);
    if (p.layout.interleaved(operands)) return interleaved<scalar_t>(p);
    if (p.layout.planar(operands)) return planar<scalar_t>(p);
    strided<scalar_t>(p);
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
