// SPDX-License-Identifier: Apache-2.0
// CUDA: choice of the chunk, the block and the grid, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "qk_norm_rope/qk_norm_rope_cuda.cuh"

namespace vidkernels {
namespace rope {

inline bool strides_fit(const QkNormRopeParams& p, const int64_t (&stride)[3], int64_t heads, int chunk) {
  return (p.batch == 1 || stride[0] % chunk == 0) && (p.tokens == 1 || stride[1] % chunk == 0) &&
         (heads == 1 || stride[2] % chunk == 0);
}

// Whether every chunk of `chunk` channels lies in one piece of the layout and at an aligned address.
inline bool chunk_fits(const QkNormRopeParams& p, int chunk, int element_bytes) {
  const bool interleaved = p.layout == RotaryLayout::interleaved;
  if (p.head_dim % (interleaved ? chunk : 2 * chunk) != 0) return false;
  if (p.layout == RotaryLayout::half && p.pairs % chunk != 0) return false;
  for (int axis = 0; p.layout == RotaryLayout::axis_half && axis < p.axes; ++axis) {
    if (p.axis_pairs[axis] % chunk != 0) return false;
  }
  for (const QkSide& side : p.side) {
    if (side.heads == 0) continue;
    const size_t bytes = static_cast<size_t>(chunk) * element_bytes;
    if (!cuda::aligned(side.x, bytes) || !cuda::aligned(side.y, bytes) || !cuda::aligned(side.dy, bytes)) return false;
    if (!cuda::aligned(side.weight, std::min(16, chunk * (side.weight_dtype == DType::float32 ? 4 : 2)))) return false;
    if (!strides_fit(p, side.x_stride, side.heads, chunk) || !strides_fit(p, side.y_stride, side.heads, chunk))
      return false;
    if (side.dy != nullptr && !strides_fit(p, side.dy_stride, side.heads, chunk)) return false;
  }
  return true;
}

// Threads for one token's units, and as many tokens as make a block of at least 128 threads.
inline dim3 block_of(const Plan& plan, int unit_values) {
  const int units_per_thread = kThreadValues / unit_values;
  const int threads = (std::max(1, (plan.units + units_per_thread - 1) / units_per_thread) + 31) / 32 * 32;
  return dim3(threads, std::max(1, 128 / threads));
}

inline Plan make_plan(const QkNormRopeParams& p, int unit_values) {
  Plan plan{};
  plan.tokens = p.batch * p.tokens;
  plan.units_per_head = static_cast<int>(p.head_dim / unit_values);
  plan.units = static_cast<int>(p.side[0].heads + p.side[1].heads) * plan.units_per_head;
  const int per_head = plan.units_per_head;
  const bool neighbours = per_head <= 32 && (per_head & (per_head - 1)) == 0;
  plan.head_lanes = p.norm == QkNorm::head && neighbours ? per_head : 0;
  if (p.norm == QkNorm::head && !neighbours) plan.sums = plan.units;
  if (p.norm == QkNorm::full) plan.sums = 2 * static_cast<int>(block_of(plan, unit_values).x / 32);
  for (int side = 0; side < 2; ++side) {
    const int64_t count = p.head_dim * (p.norm == QkNorm::full ? p.side[side].heads : 1);
    plan.part[side] = count == 0 ? 0.0f : 1.0f / static_cast<float>(count);
  }
  int begin = 0;
  for (int axis = 0; axis < kRotaryMaxAxes; ++axis) {
    const int count = p.frequencies == nullptr && axis < p.axes ? static_cast<int>(p.axis_pairs[axis]) : 0;
    for (int i = 0; i < count; ++i) {
      const double turns = p.position_scale[axis] * 0.15915494309189535 *
                           std::pow(p.theta[axis], -static_cast<double>(i) / static_cast<double>(count));
      const float high = static_cast<float>(turns);
      plan.turns[begin + i] = {high, static_cast<float>(turns - static_cast<double>(high))};
    }
    begin += count;
    plan.pair_end[axis] = begin;
  }
  return plan;
}

// Blocks that fill the device about once; each then walks over its share of the tokens.
inline int64_t grid_of(const Plan& plan, dim3 block, int threads_per_multiprocessor) {
  const int64_t blocks = std::max<int64_t>(1, threads_per_multiprocessor / static_cast<int>(block.x * block.y));
  const int64_t steps = (plan.tokens + block.y - 1) / block.y;
  return std::min<int64_t>(steps, cuda::multiprocessors() * blocks);
}

inline int64_t angle_bytes(const QkNormRopeParams& p, dim3 block) {
  const int64_t shared_by_heads =
      p.frequency_heads == 1 ? 2 * block.y * AngleTable::row_size(static_cast<int>(p.pairs)) : 0;
  return kMaxPairs * sizeof(TurnsPerUnit) + shared_by_heads * sizeof(float2);
}

// Calls f(interleaved, chunk), integral constants: 16-byte chunks if they fit, then 4 values, then the smallest.
template <typename T, typename F>
void with_shape(const QkNormRopeParams& p, const F& f) {
  const auto with_chunk = [&](auto interleaved) {
    if constexpr (sizeof(T) == 2) {
      if (chunk_fits(p, 8, sizeof(T))) return f(interleaved, std::integral_constant<int, 8>{});
    }
    if (chunk_fits(p, 4, sizeof(T))) return f(interleaved, std::integral_constant<int, 4>{});
    f(interleaved, std::integral_constant<int, interleaved.value ? 2 : 1>{});
  };
  if (p.layout == RotaryLayout::interleaved) return with_chunk(std::true_type{});
  with_chunk(std::false_type{});
}

inline int64_t channels_of(const QkSide& side, int64_t head_dim) { return side.heads * head_dim; }

// Calls f(params) once, or once per side if a block cannot hold both sides of a token.
template <typename F>
void in_launches(const QkNormRopeParams& p, const F& f) {
  if (channels_of(p.side[0], p.head_dim) + channels_of(p.side[1], p.head_dim) <= kMaxChannels) return f(p);
  for (int side = 0; side < 2; ++side) {
    QkNormRopeParams one = p;
    one.side[1 - side].heads = 0;
    f(one);
  }
}

inline void check_limits(const QkNormRopeParams& p) {
  const int64_t widest = std::max(channels_of(p.side[0], p.head_dim), channels_of(p.side[1], p.head_dim));
  if (p.head_dim % 2 == 0 && p.head_dim <= 2 * kMaxPairs && widest <= kMaxChannels) return;
  throw std::runtime_error(
      "qk_norm_rope: the CUDA kernel needs an even head dimension of at most 256 and at most 8192 channels a side");
}

}  // namespace rope
}  // namespace vidkernels
