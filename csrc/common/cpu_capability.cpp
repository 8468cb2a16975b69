// SPDX-License-Identifier: Apache-2.0
#include "common/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(VK_CPU_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool detect_tiles() {
#if defined(VK_EMULATE_TILES)
  return true;
#elif defined(VK_CPU_HAS_AMX) && defined(__linux__)
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int kBfloat16 = 1u << 22, kTile = 1u << 24;
  if (cpu_capability() != CpuCapability::avx512_bf16 || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBfloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = detect();
  return capability;
}

bool cpu_has_tiles() {
  static const bool tiles = detect_tiles();
  return tiles;
}

}  // namespace vidkernels
