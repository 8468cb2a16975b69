// SPDX-License-Identifier: Apache-2.0
// Parameters of the adaLN-Zero kernels, and what the CPU and CUDA kernels share.
//
//   hidden = x + gate * branch                       (chain and gate_residual; gate may be missing: 1)
//   y      = norm(hidden) * a + s                    (chain and modulate)
//   a = weight * (1 + scale), s = bias * (1 + scale) + shift, one row of each per group of tokens
//
// Folding weight and bias into the row of (a, s) leaves one multiply-add per element whatever is present, and the
// backward needs only two sums per row of modulation, P = sum dy * xhat and Q = sum dy:
//   dshift = Q, dscale = weight * P + bias * Q, dweight = sum_rows (1 + scale) * P, dbias = sum_rows (1 + scale) * Q.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace vidkernels {
namespace adaln {

enum class Norm : int32_t { none = 0, layer = 1, rms = 2 };

// Rows of C values, or one row of weight or bias; data is null where the operand is missing.
struct Table {
  const void* data = nullptr;
  int64_t stride = 0;  // elements between rows
  DType dtype = DType::float32;
};

// A gradient with the shape of a Table, contiguous; data is null where it is not wanted.
struct TableGrad {
  void* data = nullptr;
  DType dtype = DType::float32;
};

// Which row of modulation a token takes. Exactly one of three forms:
//   cu_seqlens: row r owns the positions cu_seqlens[r] * unit .. cu_seqlens[r + 1] * unit - 1 (the first row also what
//               precedes it, the last what follows it); `order` maps a position to its token, in groups of `unit`.
//   index:      the row of token n is index[n / unit].
//   neither:    the row of token n is n / unit.
struct RowMap {
  const int32_t* cu_seqlens = nullptr;
  const int32_t* index = nullptr;
  const int32_t* order = nullptr;
  int64_t unit = 1;
  int64_t count = 0;
};

struct ForwardParams {
  const void* x = nullptr;       // [tokens, channels]: the residual, or the input of modulate
  const void* branch = nullptr;  // [tokens, channels] or null
  void* hidden = nullptr;        // [tokens, channels], given exactly when branch is
  void* y = nullptr;             // [tokens, channels]; null computes gate_residual alone
  void* mean = nullptr;          // [tokens] float32 (float64 for float64), or null
  void* rstd = nullptr;          // [tokens] likewise
  Table gate, shift, scale, weight, bias;
  RowMap rows;
  int64_t tokens = 0, channels = 0;
  double eps = 0;
  Norm norm = Norm::layer;
  DType dtype = DType::float32;
};

struct BackwardParams {
  const void* dhidden = nullptr;  // [tokens, channels] or null: gradient that arrives at hidden from elsewhere
  const void* dy = nullptr;       // [tokens, channels]; null for gate_residual alone, whose dhidden is given
  const void* hidden = nullptr;   // [tokens, channels]: what the norm read; null where dy is
  const void* branch = nullptr;   // [tokens, channels] or null
  const void* mean = nullptr;
  const void* rstd = nullptr;
  Table gate, scale, weight, bias;
  RowMap rows;
  void* dx = nullptr;       // [tokens, channels] or null
  void* dbranch = nullptr;  // [tokens, channels] or null
  TableGrad dgate, dshift, dscale, dweight, dbias;
  // Scratch, float32 (float64 for float64), null where nothing of the kind is wanted: sums per piece of a row, each
  // [slots, channels], and dweight, dbias per chunk, each [chunks, channels].
  void* partial[3] = {nullptr, nullptr, nullptr};
  void* affine[2] = {nullptr, nullptr};
  int64_t tokens = 0, channels = 0;
  int64_t chunk = 1;  // tokens a chunk, a multiple of rows.unit where `direct`
  Norm norm = Norm::layer;
  DType dtype = DType::float32;
  bool direct = false;  // every row of modulation lies inside one chunk, which writes its gradients at once
};

// Sums that a backward keeps per row: P, Q of the modulation and G = sum dhidden * branch of the gate.
enum Sum : int { sum_p = 0, sum_q = 1, sum_g = 2 };

// Compiled once per instruction set (see common/macros.h).
inline namespace VK_CPU_CAPABILITY {

// Chunks cut the positions 0 .. tokens - 1 at multiples of `chunk`, rows cut them at the rows' ends. The pieces between
// neighbouring cuts have distinct and increasing (chunk + row), which serves as the piece's slot: no atomics, no prefix
// sum, and the sum over a row's slots has one order.
VK_HOST_DEVICE int64_t slot_of(int64_t chunk_index, int64_t row) { return chunk_index + row; }

VK_HOST_DEVICE int64_t row_begin(const RowMap& rows, int64_t row) {
  if (rows.cu_seqlens == nullptr) return row * rows.unit;
  return row == 0 ? 0 : static_cast<int64_t>(rows.cu_seqlens[row]) * rows.unit;
}

VK_HOST_DEVICE int64_t row_end(const RowMap& rows, int64_t row, int64_t tokens) {
  if (row + 1 == rows.count) return tokens;
  return rows.cu_seqlens == nullptr ? (row + 1) * rows.unit
                                    : static_cast<int64_t>(rows.cu_seqlens[row + 1]) * rows.unit;
}

// Row that owns a position: the last one that begins at or before it (empty rows begin where the next one does). Always
// a row of the table, whatever the index holds: on a GPU nobody has checked it.
VK_HOST_DEVICE int64_t row_of(const RowMap& rows, int64_t position) {
  const int64_t group =
      rows.unit == 1 ? position : position / rows.unit;  // a 64-bit division takes some 70 instructions
  if (rows.index != nullptr) {
    const int64_t row = rows.index[group];
    return row < 0 ? 0 : (row < rows.count ? row : rows.count - 1);
  }
  if (rows.cu_seqlens == nullptr) return group;
  int64_t low = 0, high = rows.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (static_cast<int64_t>(rows.cu_seqlens[middle]) * rows.unit <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// End of the run of positions from `position` on that share `row`; beyond `position` even where cu_seqlens is
// malformed.
VK_HOST_DEVICE int64_t run_end(const RowMap& rows, int64_t position, int64_t row, int64_t tokens) {
  const int64_t end = rows.index != nullptr ? (position / rows.unit + 1) * rows.unit : row_end(rows, row, tokens);
  const int64_t least = position + 1;
  return end < least ? least : (end > tokens ? tokens : end);
}

VK_HOST_DEVICE int64_t token_of(const RowMap& rows, int64_t position) {
  if (rows.order == nullptr) return position;
  return static_cast<int64_t>(rows.order[position / rows.unit]) * rows.unit + position % rows.unit;
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace adaln

// `stream` is a cudaStream_t, without CUDA's headers.
namespace adaln {
void forward_cuda(const ForwardParams& params, void* stream);
void backward_cuda(const BackwardParams& params, void* stream);
// Tokens a chunk for backward_cuda: one wave of blocks over the device's multiprocessors.
int64_t backward_chunk_cuda(const BackwardParams& params);
}  // namespace adaln

VK_DECLARE_CPU(adaln_forward, adaln::ForwardParams)
VK_DECLARE_CPU(adaln_backward, adaln::BackwardParams)

}  // namespace vidkernels
