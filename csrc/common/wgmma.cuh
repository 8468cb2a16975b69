// SPDX-License-Identifier: Apache-2.0
// The matrix instruction of sm_90a: 64 rows by 96, 128, 160 or 192 columns, a sum of 16 products, by a warpgroup, both
// operands in shared memory. PTX wants every register of the sums by name.
#pragma once

#include <type_traits>

#include "common/cuda.h"

namespace vidkernels {
namespace cuda {

#define VK_REGISTERS_48                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"             \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define VK_REGISTERS_64 \
  VK_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VK_REGISTERS_80 \
  VK_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define VK_REGISTERS_96 \
  VK_REGISTERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VK_SUMS_8(I)                                                                                              \
  "+f"(d[I + 0]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), \
      "+f"(d[I + 7])
#define VK_SUMS_16(I) VK_SUMS_8(I), VK_SUMS_8(I + 8)
#define VK_SUMS_48 VK_SUMS_16(0), VK_SUMS_16(16), VK_SUMS_16(32)
#define VK_SUMS_64 VK_SUMS_48, VK_SUMS_16(48)
#define VK_SUMS_80 VK_SUMS_64, VK_SUMS_16(64)
#define VK_SUMS_96 VK_SUMS_80, VK_SUMS_16(80)

// A, B and ADD: the operands behind the sums, by number.
#define VK_WGMMA(TYPE, COLUMNS, SUMS, A, B, ADD)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                                       \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" VK_REGISTERS_##SUMS \
               "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"                                                        \
               : VK_SUMS_##SUMS                                                                              \
               : "l"(a), "l"(b), "r"(add))

// d = a b^T, or d + a b^T where `add` is not 0. d[4 j + 2 h + e] of lane l in warp w of the four is the sum in row
// 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + e.
#define VK_MULTIPLY(COLUMNS, SUMS, A, B, ADD)                                          \
  template <typename T>                                                                \
  __device__ inline void multiply(float (&d)[SUMS], uint64_t a, uint64_t b, int add) { \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                  \
      VK_WGMMA("bf16", COLUMNS, SUMS, A, B, ADD);                                      \
    } else {                                                                           \
      VK_WGMMA("f16", COLUMNS, SUMS, A, B, ADD);                                       \
    }                                                                                  \
  }
VK_MULTIPLY("96", 48, "%48", "%49", "%50")
VK_MULTIPLY("128", 64, "%64", "%65", "%66")
VK_MULTIPLY("160", 80, "%80", "%81", "%82")
VK_MULTIPLY("192", 96, "%96", "%97", "%98")
#undef VK_MULTIPLY
#undef VK_WGMMA

}  // namespace cuda
}  // namespace vidkernels
