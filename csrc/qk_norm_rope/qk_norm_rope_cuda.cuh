// SPDX-License-Identifier: Apache-2.0
// CUDA: how a token's channels lie on the threads of a block, and the angles. Shared by forward and backward.
//
// A block serves `tokens_per_block` tokens at a time, both sides, all heads. A token's channels are cut into units of
// kChunk neighbours (interleaved) or two chunks of kChunk that hold the two members of kChunk pairs (half layouts); a
// thread owns a few units, for every token the block visits. All loads of a token are in flight before the first
// barrier; sines and cosines are made once per token, by other threads' idle slots, and shared by all heads.
#pragma once

#include "common/cuda.h"
#include "qk_norm_rope/qk_norm_rope.h"

namespace vidkernels {
namespace rope {

constexpr int kMaxPairs = 128;
constexpr int kMaxThreads = 512;
constexpr int kThreadValues = 16;                          // channels a thread holds of every token
constexpr int kMaxChannels = kMaxThreads * kThreadValues;  // of one token in one launch

struct TurnsPerUnit {
  float high, low;  // the sum is the frequency in turns, to 48 bits
};

// What the host adds to the parameters.
struct Plan {
  int64_t tokens;  // of the whole batch
  int units_per_head;
  int units;       // of both sides
  int head_lanes;  // lanes of a warp that hold a head, if those are neighbours and their sums the norm's; else 0
  int sums;        // of a token that go through shared memory
  float part[2];   // of q and k: 1 / channels that share a mean
  int pair_end[kRotaryMaxAxes];
  TurnsPerUnit turns[kMaxPairs];
};

template <bool kInterleaved, int kChunk>
struct UnitShape {
  static constexpr int chunks = kInterleaved ? 1 : 2;
  static constexpr int values = chunks * kChunk;
  static constexpr int pairs = values / 2;
  static constexpr int units = kThreadValues / values;  // per thread
};

// One unit of one side of a token: its channels within the head and its first pair. Two words, since a thread keeps all
// of its units in registers.
struct Unit {
  uint32_t place;   // head << 1 | side, or kNone
  uint32_t within;  // first << 20 | second << 10 | pair; second: start of the second chunk

  static constexpr uint32_t kNone = 0xffffffffu;
  __device__ bool active() const { return place != kNone; }
  __device__ int side() const { return static_cast<int>(place & 1u); }
  __device__ int head() const { return static_cast<int>(place >> 1); }
  __device__ int first() const { return static_cast<int>(within >> 20); }
  __device__ int second() const { return static_cast<int>(within >> 10 & 1023u); }
  __device__ int pair() const { return static_cast<int>(within & 1023u); }
};

// The same unit, of which the compiler knows nothing: addresses made from it are computed again for every token instead
// of being kept, eight registers a unit, over the whole kernel (measured: 120 registers and spills without this).
__device__ inline Unit anew(Unit unit) {
  asm volatile("" : "+r"(unit.place), "+r"(unit.within));
  return unit;
}

template <bool kInterleaved, int kChunk>
__device__ inline Unit make_unit(const QkNormRopeParams& p, const Plan& plan, int index) {
  if (index >= plan.units) return {Unit::kNone, 0};
  const int of_q = static_cast<int>(p.side[0].heads) * plan.units_per_head;
  const int side = index >= of_q ? 1 : 0;
  const int rest = index - side * of_q;
  const int head = rest / plan.units_per_head;
  const int within = rest - head * plan.units_per_head;
  const int pairs = static_cast<int>(p.pairs);
  int pair = within * kChunk, first = pair, second = 0;
  if (kInterleaved) {
    pair /= 2;
  } else if (pair >= pairs) {  // channels that pass
    first = 2 * pair;
    second = first + kChunk;
  } else if (p.layout == RotaryLayout::half) {
    second = pair + pairs;
  } else {
    const int axis = (pair >= plan.pair_end[0]) + (pair >= plan.pair_end[1]);
    const int begin = axis == 0 ? 0 : plan.pair_end[axis - 1];
    first = begin + pair;
    second = first + plan.pair_end[axis] - begin;
  }
  return {static_cast<uint32_t>(head) << 1 | static_cast<uint32_t>(side),
          static_cast<uint32_t>(first) << 20 | static_cast<uint32_t>(second) << 10 | static_cast<uint32_t>(pair)};
}

// Values an access moves of a chunk of N. The smallest chunks are for addresses that are multiples of nothing but the
// value's own size (with_shape): one by one.
template <typename T, int N>
constexpr int kAccess = N < 4 ? 1 : (N * static_cast<int>(sizeof(T)) <= 16 ? N : 16 / static_cast<int>(sizeof(T)));

template <typename T, int N>
__device__ inline void load_chunk(const T* source, float* target) {
  constexpr int kStep = kAccess<T, N>;
#pragma unroll
  for (int j = 0; j < N; j += kStep) {
    const auto pack = *reinterpret_cast<const cuda::Pack<T, kStep>*>(source + j);
#pragma unroll
    for (int i = 0; i < kStep; ++i) target[j + i] = cuda::widen(pack.value[i]);
  }
}

template <typename T, bool kInterleaved, int kChunk>
__device__ inline void load_unit(const T* head, const Unit& unit,
                                 float (&value)[UnitShape<kInterleaved, kChunk>::values]) {
  load_chunk<T, kChunk>(head + unit.first(), value);
  if (!kInterleaved) load_chunk<T, kChunk>(head + unit.second(), value + kChunk);
}

template <typename T, bool kInterleaved, int kChunk>
__device__ inline void store_unit(T* head, const Unit& unit,
                                  const float (&value)[UnitShape<kInterleaved, kChunk>::values]) {
#pragma unroll
  for (int j = 0; j < UnitShape<kInterleaved, kChunk>::values; j += kAccess<T, kChunk>) {
    cuda::Pack<T, kAccess<T, kChunk>> pack;
#pragma unroll
    for (int i = 0; i < kAccess<T, kChunk>; ++i) pack.value[i] = cuda::narrow<T>(value[j + i]);
    cuda::store_pack(head + (j < kChunk ? unit.first() + j : unit.second() + j - kChunk), pack);
  }
}

// The norm's weights at the unit's channels, ones without a weight.
template <typename T, bool kInterleaved, int kChunk>
__device__ inline void load_weight(const QkNormRopeParams& p, const Unit& unit,
                                   float (&weight)[UnitShape<kInterleaved, kChunk>::values]) {
  const QkSide& side = p.side[unit.side()];
  if (side.weight == nullptr) {
#pragma unroll
    for (int i = 0; i < UnitShape<kInterleaved, kChunk>::values; ++i) weight[i] = 1.0f;
    return;
  }
  const int64_t start = p.norm == QkNorm::full ? unit.head() * p.head_dim : 0;
  if (side.weight_dtype == DType::float32) {
    load_unit<float, kInterleaved, kChunk>(static_cast<const float*>(side.weight) + start, unit, weight);
  } else {
    load_unit<T, kInterleaved, kChunk>(static_cast<const T*>(side.weight) + start, unit, weight);
  }
}

__device__ inline int64_t offset_of(const int64_t (&stride)[3], int64_t batch, int64_t token, int head) {
  return batch * stride[0] + token * stride[1] + head * stride[2];
}

// A position as a sum of two floats, exact for integers below 2^48.
__device__ inline float2 read_position(const QkNormRopeParams& p, int64_t index) {
  if (p.position_dtype == DType::float32) return {static_cast<const float*>(p.positions)[index], 0.0f};
  if (p.position_dtype == DType::float64) {
    const double value = static_cast<const double*>(p.positions)[index];
    const float high = static_cast<float>(value);
    return {high, static_cast<float>(value - static_cast<double>(high))};
  }
  const int64_t value = p.position_dtype == DType::int32 ? static_cast<const int32_t*>(p.positions)[index]
                                                         : static_cast<const int64_t*>(p.positions)[index];
  const float high = static_cast<float>(value);
  return {high, static_cast<float>(value - static_cast<int64_t>(high))};
}

// Adds position * frequency to an angle kept as quarter turns and a rest below an eighth turn. The product's rounding
// error is recovered by the fused multiply-add, so the rest is exact to 2^-28 turns. Quarters are counted in 32 bits:
// the angle ends at 2^29 turns.
__device__ inline void add_turns(float2 position, TurnsPerUnit frequency, float& rest, int32_t& quarter) {
  const float turns = position.x * frequency.high;
  const float error = fmaf(position.x, frequency.high, -turns);
  const float quarters = rintf(4.0f * turns);
  quarter += static_cast<int32_t>(quarters);
  rest += fmaf(quarters, -0.25f, turns) + (error + fmaf(position.x, frequency.low, position.y * frequency.high));
}

__device__ inline TurnsPerUnit read_frequency(const QkNormRopeParams& p, int64_t index) {
  if (p.frequency_dtype == DType::float64) {
    const double turns = static_cast<const double*>(p.frequencies)[index] * 0.15915494309189535;
    const float high = static_cast<float>(turns);
    return {high, static_cast<float>(turns - static_cast<double>(high))};
  }
  const float radians = static_cast<const float*>(p.frequencies)[index];
  const float high = radians * 0.15915494f;
  return {high, fmaf(radians, 0.15915494f, -high) + radians * 6.4206382e-09f};  // 1 / 2 pi = 0.15915494f + 6.42e-09
}

// Which batch entry a token belongs to. A 64-bit division takes some 25 instructions, and most calls have one entry.
__device__ inline int64_t batch_of(const QkNormRopeParams& p, int64_t token) {
  return p.batch == 1 ? 0 : token / p.tokens;
}

__device__ inline int64_t position_offset(const QkNormRopeParams& p, int64_t token) {
  const int64_t batch = batch_of(p, token);
  return batch * p.position_stride[0] + (token - batch * p.tokens) * p.position_stride[1];
}

// (cosine, sine) of one pair's angle; `table` is the closed form's frequencies.
__device__ inline float2 cos_sin(const QkNormRopeParams& p, const Plan& plan, const TurnsPerUnit* table,
                                 int64_t position, int pair, int head) {
  float rest = 0.0f;
  int32_t quarter = 0;
  if (p.frequencies == nullptr) {
    const int axis = (pair >= plan.pair_end[0]) + (pair >= plan.pair_end[1]);
    add_turns(read_position(p, position + axis * p.position_stride[2]), table[pair], rest, quarter);
  } else {
    for (int axis = 0; axis < p.axes; ++axis) {
      const TurnsPerUnit frequency = read_frequency(p, (axis * p.frequency_heads + head) * p.pairs + pair);
      // An axis that does not move the pair must not hand on its NaN or Inf.
      if (frequency.high == 0.0f) continue;
      add_turns(read_position(p, position + axis * p.position_stride[2]), frequency, rest, quarter);
    }
  }
  const float more = rintf(4.0f * rest);
  float sine, cosine;
  sincos_eighth_turn(rest - 0.25f * more, sine, cosine);
  add_quarter_turns(quarter + static_cast<int32_t>(more), sine, cosine);
  return {cosine, sine};
}

// Shared memory: frequencies, then for each of two turns and each token of the block its (cosine, sine) per pair.
struct AngleTable {
  TurnsPerUnit* frequencies;
  float2* values;
  int pairs;

  // Rows are padded to whole 16-byte loads of the last unit.
  __host__ __device__ static int row_size(int pairs) { return (pairs + 7) / 8 * 8; }
  __device__ float2* row(int turn, int slot) const { return values + (turn * blockDim.y + slot) * row_size(pairs); }

  // Once per block; a barrier must follow before the first fill.
  __device__ void begin(const Plan& plan) const {
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < pairs && i < kMaxPairs; i += blockDim.x * blockDim.y) {
      frequencies[i] = plan.turns[i];
    }
  }

  // Tokens first_token .. of the block, for tables shared by the heads.
  __device__ void fill(const QkNormRopeParams& p, const Plan& plan, int turn, int64_t first_token) const {
    const int count = pairs * static_cast<int>(blockDim.y);
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y) {
      const int slot = i / pairs, pair = i - slot * pairs;
      if (first_token + slot >= plan.tokens) break;
      row(turn, slot)[pair] = cos_sin(p, plan, frequencies, position_offset(p, first_token + slot), pair, 0);
    }
  }
};

// (cosine, sine) of the unit's pairs; those that are not rotated hold anything.
template <int kPairs>
__device__ inline void read_angles(const QkNormRopeParams& p, const Plan& plan, const AngleTable& table, int turn,
                                   int64_t token, const Unit& unit, float2 (&angle)[kPairs]) {
  if (p.frequency_heads > 1) {
    const int64_t position = position_offset(p, token);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angle[i] = {1.0f, 0.0f};
      if (unit.pair() + i < p.pairs)
        angle[i] = cos_sin(p, plan, table.frequencies, position, unit.pair() + i, unit.head());
    }
    return;
  }
  if (unit.pair() >= p.pairs) return;
  const float2* row = table.row(turn, threadIdx.y) + unit.pair();
  if constexpr (kPairs == 1) {
    angle[0] = row[0];
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      [[maybe_unused]] const float4 two = *reinterpret_cast<const float4*>(row + i);
      angle[i] = {two.x, two.y};
      angle[i + 1] = {two.z, two.w};
    }
  }
}

// Turns the unit's pairs by their angles, backwards for direction -1.
template <bool kInterleaved, int kChunk>
__device__ inline void rotate_unit(const QkNormRopeParams& p, const Plan& plan, const AngleTable& table, int turn,
                                   int64_t token, const Unit& unit, float direction,
                                   float (&value)[UnitShape<kInterleaved, kChunk>::values]) {
  constexpr int kPairs = UnitShape<kInterleaved, kChunk>::pairs;
  float2 angle[kPairs];
  read_angles<kPairs>(p, plan, table, turn, token, unit, angle);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (unit.pair() + i >= p.pairs) continue;
    const int at_a = kInterleaved ? 2 * i : i, at_b = kInterleaved ? 2 * i + 1 : kChunk + i;
    const float a = value[at_a], b = value[at_b], sine = direction * angle[i].y;
    value[at_a] = a * angle[i].x - b * sine;
    value[at_b] = b * angle[i].x + a * sine;
  }
}

// Shared memory for sums over a head (one per unit) or over all heads of a side (one per warp and side).
template <typename Sum>
struct SumTable {
  Sum* values;
  int stride;  // per token of the block

  __device__ Sum* row(int turn) const { return values + (turn * blockDim.y + threadIdx.y) * stride; }
};

__device__ inline float add(float a, float b) { return a + b; }
__device__ inline float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float warp_total(float value) { return cuda::warp_sum(value); }
__device__ inline float2 warp_total(float2 value) { return {cuda::warp_sum(value.x), cuda::warp_sum(value.y)}; }

// Before the barrier: hands in this thread's sums, one per unit.
template <typename Sum, int kUnits>
__device__ inline void put_sums(const QkNormRopeParams& p, const SumTable<Sum>& table, int turn,
                                const Unit (&unit)[kUnits], const Sum (&sum)[kUnits]) {
  Sum* row = table.row(turn);
  if (p.norm == QkNorm::head) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (unit[i].active()) row[i * blockDim.x + threadIdx.x] = sum[i];
    }
    return;
  }
  Sum q{}, k{};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (!unit[i].active()) continue;
    if (unit[i].side() == 0) q = add(q, sum[i]);
    if (unit[i].side() == 1) k = add(k, sum[i]);
  }
  q = warp_total(q);
  k = warp_total(k);
  if (threadIdx.x % 32 != 0) return;
  row[2 * (threadIdx.x / 32)] = q;
  row[2 * (threadIdx.x / 32) + 1] = k;
}

// Index of the first unit of the unit's head among the token's units.
__device__ inline int head_start(const QkNormRopeParams& p, const Plan& plan, const Unit& unit) {
  return (unit.side() * static_cast<int>(p.side[0].heads) + unit.head()) * plan.units_per_head;
}

// After the barrier: the sum over the channels that share the unit's mean.
template <typename Sum>
__device__ inline Sum get_sum(const QkNormRopeParams& p, const Plan& plan, const SumTable<Sum>& table, int turn,
                              const Unit& unit) {
  const Sum* row = table.row(turn);
  const bool head = p.norm == QkNorm::head;
  const int count = head ? plan.units_per_head : static_cast<int>(blockDim.x) / 32;
  const int start = head ? head_start(p, plan, unit) : unit.side(), step = head ? 1 : 2;
  Sum total = row[start];
  for (int i = 1; i < count; ++i) total = add(total, row[start + i * step]);
  return total;
}

__device__ inline float shuffled(float value, int bits) { return __shfl_xor_sync(0xffffffffu, value, bits); }
__device__ inline float2 shuffled(float2 value, int bits) { return {shuffled(value.x, bits), shuffled(value.y, bits)}; }

// The same by exchanges within a warp, where a head lies on plan.head_lanes neighbouring lanes: no shared memory and no
// barrier. All threads take part.
template <typename Sum, int kUnits>
__device__ inline void head_sums(const Plan& plan, Sum (&sum)[kUnits]) {
  for (int bits = plan.head_lanes / 2; bits > 0; bits /= 2) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) sum[i] = add(sum[i], shuffled(sum[i], bits));
  }
}

}  // namespace rope
}  // namespace vidkernels
