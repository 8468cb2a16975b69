// SPDX-License-Identifier: Apache-2.0
// Lookup-free quantization: the sign of every channel, and the integer that the signs of a token spell.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/token_layout.h"

namespace vidkernels {

constexpr int64_t kLfqMaxBits = 62;
// torch.nn.functional.normalize divides by no less than this.
constexpr double kLfqNormFloor = 1e-12;

// u = x, or scale * x / |x| where spherical; code = magnitude where u > 0, -magnitude elsewhere (NaN included).
// value = code, or u + (code - u) where additive. Operands of the layout: 0 x, 1 values.
struct LfqFwdParams {
  TokenLayout layout;
  const void* x = nullptr;
  void* values = nullptr;      // null if not wanted
  int64_t* indices = nullptr;  // [outer, inner, codebooks] contiguous, null if not wanted
  double magnitude = 1;
  double scale = 1;
  DType dtype = DType::float32;
  bool lsb_first = false;
  bool spherical = false;
  bool additive = false;
};

// Gradient of u on the sphere: dx = scale / |x| * (g - x <x, g> / |x|^2). Operands of the layout: 0 x, 1 g, 2 dx.
struct LfqBwdParams {
  TokenLayout layout;
  const void* x = nullptr;
  const void* grad = nullptr;
  void* dx = nullptr;
  double scale = 1;
  DType dtype = DType::float32;
};

// Codes of indices, of which the lowest `channels` bits are read. Operand 1 of the layout is codes.
struct LfqDecodeParams {
  TokenLayout layout;
  const void* indices = nullptr;  // [outer, inner, codebooks] contiguous
  void* codes = nullptr;
  double magnitude = 1;
  DType dtype = DType::float32;
  DType index_dtype = DType::int64;
  bool lsb_first = false;
};

// Which bit of the index channel c writes.
VK_HOST_DEVICE int lfq_bit(int c, int channels, bool lsb_first) { return lsb_first ? c : channels - 1 - c; }

VK_DECLARE_CPU(lfq_fwd, LfqFwdParams)
VK_DECLARE_CPU(lfq_bwd, LfqBwdParams)
VK_DECLARE_CPU(lfq_decode, LfqDecodeParams)

}  // namespace vidkernels
