// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"

namespace vidkernels {

// Values are those of torch's ScalarType, so a binding converts by a cast.
enum class DType : int8_t {
  uint8 = 0,
  int8 = 1,
  int16 = 2,
  int32 = 3,
  int64 = 4,
  float16 = 5,
  float32 = 6,
  float64 = 7,
  boolean = 11,
  bfloat16 = 15,
};

// The type in which a kernel accumulates: float32, or float64 for float64.
template <typename T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename accumulate<T>::type;

inline namespace VK_CPU_CAPABILITY {

// Storage type of bfloat16 on the CPU: conversions only, no arithmetic. Rounds to nearest, ties to even.
struct bfloat16 {
  uint16_t bits;
};

// Storage type of float16 on the CPU. `_Float16` converts in hardware where F16C is on; GCC before 12 has none on x86.
struct float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

#if defined(__FLT16_MANT_DIG__)
inline float to_float(float16 value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
}
#else
inline float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t wide;
  float result;
  if (magnitude >= 0x7c00u) {
    wide = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    std::memcpy(&result, &wide, sizeof(result));
    return result;
  }
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and normalises subnormals.
  wide = magnitude << 13;
  std::memcpy(&result, &wide, sizeof(result));
  result *= 5.192296858534828e+33f;
  std::memcpy(&wide, &result, sizeof(wide));
  wide |= sign;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}
#endif

template <typename T>
inline T from_float(accumulate_t<T> value);

template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline double from_float<double>(double value) {
  return value;
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  const bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded >> 16)};
}

#if defined(__FLT16_MANT_DIG__)
template <>
inline float16 from_float<float16>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  float16 result;
  std::memcpy(&result.bits, &half, sizeof(half));
  return result;
}
#else
template <>
inline float16 from_float<float16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint32_t sign = (wide >> 16) & 0x8000u;
  const uint32_t magnitude = wide & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return float16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, correctly rounded, at the end of the mantissa.
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return float16{static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u);
  return float16{static_cast<uint16_t>(sign | (rounded >> 13))};
}
#endif

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels

// Runs BODY with `scalar_t` bound to the storage type of a floating dtype; returns from nothing on other dtypes, which
// the Python layer has refused already.
#define VK_DISPATCH_FLOATING(DTYPE, BODY)      \
  switch (DTYPE) {                             \
    case ::vidkernels::DType::float32: {       \
      using scalar_t = float;                  \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::float64: {       \
      using scalar_t = double;                 \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::bfloat16: {      \
      using scalar_t = ::vidkernels::bfloat16; \
      BODY();                                  \
      break;                                   \
    }                                          \
    case ::vidkernels::DType::float16: {       \
      using scalar_t = ::vidkernels::float16;  \
      BODY();                                  \
      break;                                   \
    }                                          \
    default:                                   \
      break;                                   \
  }
