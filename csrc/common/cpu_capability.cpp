// SPDX-License-Identifier: Apache-2.0
#include "common/cpu.h"

#include <cstdlib>
#include <cstring>

namespace vidkernels {
namespace {

CpuCapability detect() {
#if defined(VK_CPU_HAS_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  CpuCapability best = avx512 ? CpuCapability::avx512 : avx2 ? CpuCapability::avx2 : CpuCapability::portable;
#if defined(VK_CPU_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) best = CpuCapability::avx512_bf16;
#endif
  // torch's own variable, so that one setting lowers both libraries (and tests can reach every variant).
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "default") == 0) return CpuCapability::portable;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && avx2) return CpuCapability::avx2;
  if (wanted != nullptr && std::strcmp(wanted, "avx512") == 0 && avx512) return CpuCapability::avx512;
  return best;
#else
  return CpuCapability::portable;
#endif
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = detect();
  return capability;
}

}  // namespace vidkernels
