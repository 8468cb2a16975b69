// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
