// SPDX-License-Identifier: Apache-2.0
// CPU: sines and cosines of a token's rotary angles, computed once per token and shared by all heads of q and k.
#pragma once

#include <algorithm>
#include <vector>

#include "qk_norm_rope/qk_norm_rope.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

constexpr double kTurnsPerRadian = 0.15915494309189535;

// Pairs [begin, end) of one position axis turn by position * frequency. In table form an axis may move every pair.
struct RotarySegment {
  int axis;
  int64_t begin, end;
};

struct Rotation {
  std::vector<RotarySegment> segments;
  std::vector<double> turns_per_unit;  // [axes, frequency_heads, pairs]
  int64_t heads = 1;
};

inline double read_as_double(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::int32:
      return static_cast<const int32_t*>(data)[index];
    case DType::int64:
      return static_cast<double>(static_cast<const int64_t*>(data)[index]);
    case DType::float64:
      return static_cast<const double*>(data)[index];
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline Rotation make_rotation(const QkNormRopeParams& p) {
  Rotation rotation;
  if (p.pairs == 0) return rotation;
  if (p.frequencies != nullptr) {
    rotation.heads = p.frequency_heads;
    const int64_t count = p.axes * p.frequency_heads * p.pairs;
    rotation.turns_per_unit.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      rotation.turns_per_unit[i] = read_as_double(p.frequencies, p.frequency_dtype, i) * kTurnsPerRadian;
    }
    for (int axis = 0; axis < p.axes; ++axis) rotation.segments.push_back({axis, 0, p.pairs});
    return rotation;
  }
  rotation.turns_per_unit.assign(p.axes * p.pairs, 0.0);
  int64_t begin = 0;
  for (int axis = 0; axis < p.axes; ++axis) {
    const int64_t count = p.axis_pairs[axis];
    rotation.segments.push_back({axis, begin, begin + count});
    for (int64_t i = 0; i < count; ++i) {
      const double frequency = std::pow(p.theta[axis], -static_cast<double>(i) / static_cast<double>(count));
      rotation.turns_per_unit[axis * p.pairs + begin + i] = p.position_scale[axis] * frequency * kTurnsPerRadian;
    }
    begin += count;
  }
  return rotation;
}

// cos and sin of `count` angles given in turns. Adding 1.5 * 2^52 rounds to an integer in every instruction set and
// leaves its last two bits, the quarter, at the end of the sum.
inline void sincos(const double* VK_RESTRICT turns, float* VK_RESTRICT cosine, float* VK_RESTRICT sine, int64_t count) {
  constexpr double kRound = 6755399441055744.0;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double shifted = turns[i] * 4.0 + kRound;
    int64_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const float rest = static_cast<float>(turns[i] - (shifted - kRound) * 0.25);
    float s, c;
    sincos_eighth_turn(rest, s, c);
    add_quarter_turns(static_cast<int32_t>(bits), s, c);
    sine[i] = s;
    cosine[i] = c;
  }
}

inline void sincos(const double* turns, double* cosine, double* sine, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double rest = turns[i] - std::nearbyint(turns[i]);
    sine[i] = std::sin(rest * 6.283185307179586476925);
    cosine[i] = std::cos(rest * 6.283185307179586476925);
  }
}

// cos and sin of one token's angles. Neighbouring tokens of a video share t and mostly h: only axes whose position has
// changed are computed again.
template <typename acc_t>
class Angles {
 public:
  Angles(const QkNormRopeParams& params, const Rotation& rotation)
      : p_(params), rotation_(rotation), turns_(params.pairs), cosine_(params.pairs), sine_(params.pairs) {}

  void move_to(int64_t batch, int64_t token) {
    const int64_t at = batch * p_.position_stride[0] + token * p_.position_stride[1];
    for (int axis = 0; axis < p_.axes; ++axis) {
      const double next = read_as_double(p_.positions, p_.position_dtype, at + axis * p_.position_stride[2]);
      changed_[axis] = fresh_ || next != position_[axis];
      position_[axis] = next;
    }
    fresh_ = false;
    if (rotation_.heads == 1) compute(0);
  }

  // For tables with one row per head, after move_to.
  void move_to_head(int64_t head) {
    if (rotation_.heads > 1) compute(head);
  }

  const acc_t* cosine() const { return cosine_.data(); }
  const acc_t* sine() const { return sine_.data(); }

 private:
  void compute(int64_t head) {
    if (p_.frequencies == nullptr) {
      for (const RotarySegment& s : rotation_.segments) {
        if (!changed_[s.axis]) continue;
        const double* frequency = rotation_.turns_per_unit.data() + s.axis * p_.pairs;
        const double position = position_[s.axis];
        for (int64_t i = s.begin; i < s.end; ++i) turns_[i] = position * frequency[i];
        sincos(turns_.data() + s.begin, cosine_.data() + s.begin, sine_.data() + s.begin, s.end - s.begin);
      }
      return;
    }
    std::fill(turns_.begin(), turns_.end(), 0.0);
    for (const RotarySegment& s : rotation_.segments) {
      const double* frequency = rotation_.turns_per_unit.data() + (s.axis * rotation_.heads + head) * p_.pairs;
      const double position = position_[s.axis];
      // A pair that an axis does not move must not take over that axis's NaN or Inf.
      for (int64_t i = 0; i < p_.pairs; ++i) turns_[i] += frequency[i] == 0.0 ? 0.0 : position * frequency[i];
    }
    sincos(turns_.data(), cosine_.data(), sine_.data(), p_.pairs);
  }

  const QkNormRopeParams& p_;
  const Rotation& rotation_;
  std::vector<double> turns_;
  std::vector<acc_t> cosine_, sine_;
  double position_[kRotaryMaxAxes] = {};
  bool changed_[kRotaryMaxAxes] = {};
  bool fresh_ = true;
};

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
