// SPDX-License-Identifier: Apache-2.0
#include "common/cpu.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <string>

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

#if defined(VK_CPU_HAS_AMX) && defined(__linux__) && !defined(VK_EMULATE_TILES)
// oneDNN's own variable (two spellings), so that one setting takes AMX from both libraries.
bool user_leaves_tiles() {
  const char* named = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (named == nullptr) named = std::getenv("DNNL_MAX_CPU_ISA");
  if (named == nullptr) return true;
  std::string isa(named);
  for (char& c : isa) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return isa.find("AMX") != std::string::npos || isa == "DEFAULT" || isa == "ALL" || isa.empty();
}
#endif

bool detect_tiles() {
#if defined(VK_EMULATE_TILES)
  return true;
#elif defined(VK_CPU_HAS_AMX) && defined(__linux__)
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int kBfloat16 = 1u << 22, kTile = 1u << 24;
  if (!user_leaves_tiles() || cpu_capability() != CpuCapability::avx512_bf16) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
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
