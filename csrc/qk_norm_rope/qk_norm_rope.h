// SPDX-License-Identifier: Apache-2.0
// Query/key RMSNorm and rotary embedding: parameters, and the maths that CPU and CUDA share.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/macros.h"

namespace vidkernels {

constexpr int kRotaryMaxAxes = 3;

enum class QkNorm : int { none = 0, head = 1, full = 2 };
enum class RotaryLayout : int { interleaved = 0, half = 1, axis_half = 2 };

// q or k. Strides are in elements, over (batch, token, head); channels are neighbours in memory. `y` may equal `x`.
// The forward maps x to y; the backward maps (x, dy) to y, which then is dx.
struct QkSide {
  const void* x;
  const void* dy;
  void* y;
  const void* weight;
  void* dweight;
  int64_t heads;
  int64_t x_stride[3];
  int64_t dy_stride[3];
  int64_t y_stride[3];
  DType weight_dtype;
};

struct QkNormRopeParams {
  QkSide side[2];
  int64_t batch;
  int64_t tokens;  // per batch entry
  int64_t head_dim;
  DType dtype;
  QkNorm norm;
  double eps;
  // Rotation; pairs == 0 means none. A position is read at batch * stride[0] + token * stride[1] + axis * stride[2].
  const void* positions;
  DType position_dtype;
  int64_t position_stride[3];
  int axes;
  int64_t pairs;
  int64_t axis_pairs[kRotaryMaxAxes];  // closed form: pairs of each axis, in order
  double theta[kRotaryMaxAxes];
  double position_scale[kRotaryMaxAxes];
  const void* frequencies;  // table form: radians per unit of position, [axes, frequency_heads, pairs]
  DType frequency_dtype;
  int64_t frequency_heads;  // 1: shared by all heads
  RotaryLayout layout;
  // Backward only: partial sums of the weights' gradients, [partials, weight columns] (CUDA), or null.
  float* partial;
  int64_t partials;
};

// Values of the weights' gradients: one per channel of a head, or of all heads of a side, for q and for k.
inline int64_t qk_norm_rope_weight_columns(const QkNormRopeParams& p) {
  return p.norm == QkNorm::full ? (p.side[0].heads + p.side[1].heads) * p.head_dim : 2 * p.head_dim;
}

inline namespace VK_CPU_CAPABILITY {

// sin and cos of 2 pi `turns` for |turns| <= 1/8 + 2^-8: minimax polynomials (fitted for this file by weighted least
// squares, coefficients rounded one after another), within 4e-10 of the true value before float32's own rounding.
VK_HOST_DEVICE void sincos_eighth_turn(float turns, float& sine, float& cosine) {
  const float square = turns * turns;
  float odd = 40.53968811035156f;
  odd = odd * square - 76.66972351074219f;
  odd = odd * square + 81.60494995117188f;
  odd = odd * square - 41.34170150756836f;
  odd = odd * square - 1.7484555314695172e-07f;  // 2 pi minus its float32 value
  sine = turns * 6.2831854820251465f + turns * odd;
  float even = 58.561214447021484f;
  even = even * square - 85.4231185913086f;
  even = even * square + 64.93914031982422f;
  even = even * square - 19.739208221435547f;
  cosine = even * square + 1.0f;
}

// Adds `quarter` quarter turns to the angle whose sine and cosine are given.
VK_HOST_DEVICE void add_quarter_turns(int32_t quarter, float& sine, float& cosine) {
  const bool swap = (quarter & 1) != 0;
  const float s = swap ? cosine : sine;
  const float c = swap ? sine : cosine;
  sine = (quarter & 2) != 0 ? -s : s;
  cosine = ((quarter + 1) & 2) != 0 ? -c : c;
}

}  // namespace VK_CPU_CAPABILITY

VK_DECLARE_CPU(qk_norm_rope_fwd, QkNormRopeParams)
VK_DECLARE_CPU(qk_norm_rope_bwd, QkNormRopeParams)

}  // namespace vidkernels
