// SPDX-License-Identifier: Apache-2.0
// For kernel files (<stem>_cpu.cpp) and their headers: choice of the instruction set at run time.
#pragma once

#include "common/dtype.h"
#include "common/macros.h"
#include "common/parallel.h"

namespace vidkernels {

enum class CpuCapability : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// Best instruction set of this processor among the compiled ones (cpu_capability.cpp).
CpuCapability cpu_capability();

// Whether kernels compiled for `avx512_bf16` may use AMX's tile registers: the processor has them, the system gave
// them to this process, and the user leaves them on.
bool cpu_has_tiles();

}  // namespace vidkernels

#if defined(VK_CPU_HAS_AVX512_BF16)
#define VK_CPU_AVX512_BF16 cpu_avx512_bf16
#else
#define VK_CPU_AVX512_BF16 cpu_avx512  // the compiler does not know the instructions: the next best copy
#endif

// VK_DECLARE_CPU(fsq_fwd, FsqFwdParams) in <stem>.h declares the variants that <stem>_cpu.cpp defines as
// `namespace vidkernels { inline namespace VK_CPU_CAPABILITY { void fsq_fwd(const FsqFwdParams& params) {...} } }`
// and `vidkernels::fsq_fwd_cpu(params)`, which calls the best of them.
#if defined(VK_CPU_HAS_X86_VARIANTS)
#define VK_DECLARE_CPU(NAME, PARAMS)             \
  namespace cpu_default {                        \
  void NAME(const PARAMS& params);               \
  }                                              \
  namespace cpu_avx2 {                           \
  void NAME(const PARAMS& params);               \
  }                                              \
  namespace cpu_avx512 {                         \
  void NAME(const PARAMS& params);               \
  }                                              \
  namespace VK_CPU_AVX512_BF16 {                 \
  void NAME(const PARAMS& params);               \
  }                                              \
  inline void NAME##_cpu(const PARAMS& params) { \
    switch (cpu_capability()) {                  \
      case CpuCapability::avx512_bf16:           \
        return VK_CPU_AVX512_BF16::NAME(params); \
      case CpuCapability::avx512:                \
        return cpu_avx512::NAME(params);         \
      case CpuCapability::avx2:                  \
        return cpu_avx2::NAME(params);           \
      default:                                   \
        return cpu_default::NAME(params);        \
    }                                            \
  }
#else
#define VK_DECLARE_CPU(NAME, PARAMS) \
  namespace cpu_default {            \
  void NAME(const PARAMS& params);   \
  }                                  \
  inline void NAME##_cpu(const PARAMS& params) { cpu_default::NAME(params); }
#endif
