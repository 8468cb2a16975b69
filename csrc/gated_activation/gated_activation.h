// SPDX-License-Identifier: Apache-2.0
// Parameters of the gated activations, forward and backward, of rows [hidden, gate] or [gate, hidden]:
//
//   y = hidden * act(gate)      dhidden = dy * act(gate)      dgate = dy * hidden * act'(gate)
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace vidkernels {

// As in `ACTIVATIONS` of ops/gated_activation.py.
enum class Activation : int32_t { gelu = 0, gelu_tanh = 1, silu = 2 };

struct GatedActivationParams {
  const void* x = nullptr;
  const void* dy = nullptr;  // contiguous; null in the forward
  void* out = nullptr;       // contiguous: y [rows, width], or dx [rows, 2 * width]
  int64_t rows = 0, width = 0;
  int64_t x_row = 0;  // elements from one row of x to the next
  Activation activation = Activation::gelu;
  bool gate_first = false;
  DType dtype = DType::float32;
};

VK_DECLARE_CPU(gated_activation_fwd, GatedActivationParams)
VK_DECLARE_CPU(gated_activation_bwd, GatedActivationParams)

}  // namespace vidkernels
