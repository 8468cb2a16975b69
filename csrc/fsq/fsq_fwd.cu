// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <type_traits>

#include "common/token_kernels.cuh"
#include "fsq/fsq_cuda.cuh"

namespace vidkernels {
namespace {

// A threshold as values of type T are compared with it. Two values of 16 bits are compared by one instruction, and a
// second adds the two results to the two levels: 56 instructions for 8 values on 8 levels, where a comparison and an
// addition of integers for each took 168 and more time than the memory. Any such value reaches a threshold exactly when
// it reaches the smallest value of its type that does, hence rounded up; and levels up to 256 are exact in either type.
template <typename T>
struct Limit {
  using type = accumulate_t<T>;
  static type of(double threshold) { return static_cast<type>(threshold); }
};
template <>
struct Limit<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static type of(double threshold) {
    return {__float2bfloat16_ru(static_cast<float>(threshold)), __float2bfloat16_ru(static_cast<float>(threshold))};
  }
};
template <>
struct Limit<__half> {
  using type = __half2;
  static type of(double threshold) {
    return {__float2half_ru(static_cast<float>(threshold)), __float2half_ru(static_cast<float>(threshold))};
  }
};

// Below compute capability 9.0 there is no comparison of two bfloat16 values.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename T>
constexpr bool kPairs = std::is_same<T, __half>::value;
#else
template <typename T>
constexpr bool kPairs = sizeof(T) == 2;
#endif

// Thresholds of a level count are padded to whole runs of four with NaN, which no value reaches: one loop without a
// rest. At most 12 counts differ where indices are asked for, since 13! is beyond an int32 index; of other lists those
// with more padding are refused: kRun and kMaxPadded are CUDA_RUN and MAX_CUDA_PADDED of vidkernels/ops/fsq.py.
constexpr int kRun = 4;
constexpr int kMaxPadded = kFsqMaxThresholds + 12 * (kRun - 1);

template <typename A>
__device__ inline A single(A limit) {
  return limit;
}
__device__ inline float single(__nv_bfloat162 limit) { return __bfloat162float(limit.x); }
__device__ inline float single(__half2 limit) { return __half2float(limit.x); }

// Two values of 16 bits of different words in one register. The assembler puts a pair of halves together again at every
// use, once for each threshold, but not what an instruction of its own has made.
template <typename T>
__device__ inline unsigned joined(const T (&half)[2]) {
  unsigned short bits[2];
  memcpy(bits, half, sizeof(bits));
  const unsigned low = bits[0], high = bits[1];
#if defined(VK_SIMT_SHIM)
  return low | high << 16;
#else
  unsigned word;
  asm volatile("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(word) : "r"(low), "r"(high));
  return word;
#endif
}
template <typename Pair>
__device__ inline Pair as_pair(unsigned word) {
  Pair pair;
  memcpy(&pair, &word, sizeof(pair));
  return pair;
}

// One load of 16 bytes where four of 4 take two instructions each.
template <typename L>
struct alignas(16) Run {
  L limit[kRun];
};

template <typename T>
struct FsqQuantizer {
  using A = accumulate_t<T>;
  using Index = int32_t;
  struct State {
    uint32_t index, has_nan;  // in pairs, both tokens' halves of has_nan are with the first one
  };
  static constexpr bool kNeedsNorm = false;

  cuda::Level<A> level[kFsqMaxChannels];  // first: number of the run
  Run<typename Limit<T>::type> run[kMaxPadded / kRun];
  int32_t channels;
  bool symmetric;

  __device__ void observe(State&, A) const {}

  __device__ A take(State& state, A digit, const cuda::Level<A>& grid) const {
    state.index += static_cast<uint32_t>(digit) * grid.basis;
    return cuda::level_value<sizeof(T) == 2>(digit, grid, symmetric);
  }

  // The level is the number of thresholds reached. NaN reaches none and stays NaN. A threshold is read once for all N.
  template <int N>
  __device__ void codes(State (&state)[N], int c, T (&v)[N]) const {
    const cuda::Level<A>& grid = level[c];
    if constexpr (kPairs<T> && N % 2 == 0) {
      using Pair = typename Limit<T>::type;
      unsigned word[N / 2];
      Pair digit[N / 2];
      memset(digit, 0, sizeof(digit));
      if constexpr (sizeof(v) == 16) {
        memcpy(word, v, sizeof(v));  // as they were loaded
      } else {
#pragma unroll
        for (int j = 0; j < N / 2; ++j) word[j] = joined<T>({v[2 * j], v[2 * j + 1]});
      }
      for (int k = 0; kRun * k + 1 < grid.levels; ++k) {
        const Run<Pair> limits = run[grid.first + k];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
#pragma unroll
          for (int j = 0; j < N / 2; ++j) digit[j] = __hadd2(digit[j], __hge2(as_pair<Pair>(word[j]), limits.limit[i]));
        }
      }
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        const unsigned nan = __hneu2_mask(as_pair<Pair>(word[j]), as_pair<Pair>(word[j]));
        const T code[2] = {cuda::narrow<T>(take(state[2 * j], cuda::widen(digit[j].x), grid)),
                           cuda::narrow<T>(take(state[2 * j + 1], cuda::widen(digit[j].y), grid))};
        unsigned bits;
        memcpy(&bits, code, sizeof(bits));
        bits = (word[j] & nan) | (bits & ~nan);
        memcpy(v + 2 * j, &bits, sizeof(bits));
        state[2 * j].has_nan |= nan;
      }
    } else {
      A digit[N] = {}, value[N];
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = cuda::widen(v[j]);
      for (int k = 0; kRun * k + 1 < grid.levels; ++k) {
        const auto limits = run[grid.first + k];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const A limit = single(limits.limit[i]);
#pragma unroll
          for (int j = 0; j < N; ++j) digit[j] += value[j] >= limit ? A(1) : A(0);
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool nan = value[j] != value[j];
        state[j].has_nan |= static_cast<uint32_t>(nan);
        const A code = take(state[j], digit[j], grid);
        if (!nan) v[j] = cuda::narrow<T>(code);
      }
    }
  }

  template <int N>
  __device__ Index finish(const State (&state)[N], int token) const {
    uint32_t nan = state[token].has_nan;
    if (kPairs<T> && N % 2 == 0) nan = state[token / 2 * 2].has_nan >> (token % 2 * 16) & 0xffffu;
    return nan != 0 ? kFsqNanIndex : static_cast<Index>(state[token].index);
  }
};

template <typename T>
void launch(const FsqFwdParams& p, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (p.threshold_count > kFsqMaxThresholds)
    throw std::runtime_error("fsq: the CUDA kernel takes at most " + std::to_string(kFsqMaxThresholds) +
                             " distinct thresholds, got " + std::to_string(p.threshold_count));
  FsqQuantizer<T> quantizer = {};
  quantizer.channels = static_cast<int32_t>(p.layout.channels);
  quantizer.symmetric = p.symmetric;
  int32_t used = 0;
  for (int c = 0; c < quantizer.channels; ++c) {
    const FsqChannel& channel = p.channel[c];
    quantizer.level[c] = cuda::level_of<A>(channel);
    int same = 0;  // the first channel with these thresholds
    while (p.channel[same].first_threshold != channel.first_threshold) ++same;
    quantizer.level[c].first = same < c ? quantizer.level[same].first : used / kRun;
    if (same < c) continue;
    const int count = channel.levels - 1, padded = (count + kRun - 1) / kRun * kRun;
    if (used + padded > kMaxPadded)
      throw std::runtime_error("fsq: the CUDA kernel takes at most " + std::to_string(kMaxPadded) +
                               " thresholds with their padding");
    for (int k = 0; k < padded; ++k, ++used) {
      const double value = k < count ? p.thresholds[channel.first_threshold + k] : std::nan("");
      quantizer.run[used / kRun].limit[used % kRun] = Limit<T>::of(value);
    }
  }
  cuda::quantize_tokens<T>(quantizer, p.layout, static_cast<const T*>(p.z), static_cast<T*>(p.codes), p.indices,
                           stream);
}

}  // namespace

void fsq_fwd_cuda(const FsqFwdParams& p, cudaStream_t stream) {
  VK_CUDA_DISPATCH_FLOATING(p.dtype, [&] { launch<scalar_t>(p, stream); });
  VK_CUDA_CHECK_LAUNCH();
}

}  // namespace vidkernels
