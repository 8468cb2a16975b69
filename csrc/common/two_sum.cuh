// SPDX-License-Identifier: Apache-2.0
// Twice float32's digits out of float32 instructions: float64 runs at 1/64 of their rate on consumer GPUs.
#pragma once

#include "common/cuda.h"

namespace vidkernels {
namespace cuda {

// A number kept in two, the second holding what rounding dropped from the first. Products are taken as rounded
// (__fmul_rn), lest the compiler fuses them with the additions that measure their rounding. An infinite `high` leaves a
// NaN in `low`, which is no part of the total.
struct TwoSum {
  float high = 0, low = 0;

  __device__ static TwoSum product(float a, float b) {
    const float high = __fmul_rn(a, b);
    return {high, fmaf(a, b, -high)};
  }
  __device__ static TwoSum difference(float a, float b) {
    const float high = a - b;
    const float part = a - high;
    return {high, (a - (high + part)) + (part - b)};
  }
  __device__ void add(float value) {
    const float sum = high + value;
    const float part = sum - high;
    low += (high - (sum - part)) + (value - part);
    high = sum;
  }
  __device__ void add(TwoSum value) {
    low += value.low;
    add(value.high);
  }
  __device__ TwoSum times(float factor) const {
    TwoSum result = product(high, factor);
    result.low += low * factor;
    return result;
  }
  __device__ TwoSum times(TwoSum factor) const {
    TwoSum result = times(factor.high);
    result.low += high * factor.low;
    return result;
  }
  __device__ double total() const {
    const bool finite = fabsf(high) <= 3.402823466e38f;
    return static_cast<double>(high) + (finite ? static_cast<double>(low) : 0.0);
  }
};

// A double as two floats.
__host__ __device__ constexpr TwoSum two_parts(double value) {
  return {static_cast<float>(value), static_cast<float>(value - static_cast<double>(static_cast<float>(value)))};
}

}  // namespace cuda
}  // namespace vidkernels
