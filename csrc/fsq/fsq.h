// SPDX-License-Identifier: Apache-2.0
// Finite scalar quantization by thresholds. Rounding a squashed value is the same as counting the decision thresholds
// that the raw value has reached, so the forward needs no tanh; the thresholds come from the caller, who found them on
// the very formula that they stand for.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/token_layout.h"

namespace vidkernels {

constexpr int kFsqMaxChannels = 32;     // a codebook with int32 indices has at most 31 channels of two levels
constexpr int kFsqMaxThresholds = 256;  // of the CUDA kernels: all distinct ones travel in the launch arguments
constexpr int32_t kFsqNanIndex = INT32_MIN;

struct FsqChannel {
  int32_t levels = 2;
  int32_t first_threshold = 0;  // levels - 1 ascending thresholds start here
  uint32_t basis = 1;           // product of the levels of the channels before
};

// The value of a level: (digit - floor(L/2)) / floor(L/2), or 2/(L-1) * digit - 1 on the symmetric grid. The factor is
// float32 even for float64 codes, and the product is rounded before the subtraction, as in the formula's own graph.
template <typename A>
struct FsqGrid {
  A half;   // floor(L/2)
  A scale;  // 2/(L-1)
};
template <typename A>
inline FsqGrid<A> fsq_grid(int32_t levels) {
  return {static_cast<A>(levels / 2), static_cast<A>(2.0f / static_cast<float>(levels - 1))};
}

// Operands of the layout: 0 z, 1 codes.
struct FsqFwdParams {
  TokenLayout layout;
  const void* z = nullptr;
  void* codes = nullptr;               // null if not wanted
  int32_t* indices = nullptr;          // [outer, inner, codebooks] contiguous, null if not wanted
  const double* thresholds = nullptr;  // on the host
  int32_t threshold_count = 0;
  FsqChannel channel[kFsqMaxChannels];
  DType dtype = DType::float32;
  bool symmetric = false;
};

// dz = slope_c * dcodes * (1 - tanh^2(z + shift_c)), or slope_c * dcodes * [|z + shift_c| <= 1].
// Operands of the layout: 0 z, 1 dcodes, 2 dz.
struct FsqBwdParams {
  TokenLayout layout;
  const void* z = nullptr;
  const void* dcodes = nullptr;
  void* dz = nullptr;
  double shift[kFsqMaxChannels] = {};
  double slope[kFsqMaxChannels] = {};
  DType dtype = DType::float32;
  bool hard_clamp = false;
};

// Codes of indices; an index outside [0, codebook_size) gives NaN. Operand 1 of the layout is codes.
struct FsqDecodeParams {
  TokenLayout layout;
  const void* indices = nullptr;  // [outer, inner, codebooks] contiguous
  void* codes = nullptr;
  FsqChannel channel[kFsqMaxChannels];
  int64_t codebook_size = 0;
  DType dtype = DType::float32;
  DType index_dtype = DType::int32;
  bool symmetric = false;
};

VK_DECLARE_CPU(fsq_fwd, FsqFwdParams)
VK_DECLARE_CPU(fsq_bwd, FsqBwdParams)
VK_DECLARE_CPU(fsq_decode, FsqDecodeParams)

}  // namespace vidkernels
