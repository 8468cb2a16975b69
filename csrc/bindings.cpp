// SPDX-License-Identifier: Apache-2.0
// vidkernels._C: facts about the build. Ops do not live here: they are registered through torch's stable ABI in
// libvidkernels_cpu and libvidkernels_cuda, which serve every Python version.
#include <pybind11/pybind11.h>

#ifndef VK_BUILD_ARCHS
#define VK_BUILD_ARCHS ""
#endif
#ifndef VK_BUILD_CUDA
#define VK_BUILD_CUDA ""
#endif
#ifndef VK_BUILD_COMMIT
#define VK_BUILD_COMMIT ""
#endif
#ifndef VK_BUILD_STEMS
#define VK_BUILD_STEMS ""
#endif
#ifndef VK_BUILD_TORCH
#define VK_BUILD_TORCH ""
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda"] = VK_BUILD_CUDA;
  info["cuda_archs"] = VK_BUILD_ARCHS;
  info["compiler"] = __VERSION__;
  info["commit"] = VK_BUILD_COMMIT;
  info["stems"] = VK_BUILD_STEMS;
  info["torch_headers"] = VK_BUILD_TORCH;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(VK_CPU_HAS_AMX)
  info["cpu_variants"] = "default avx2 avx512 avx512_bf16 (amx)";
#elif defined(VK_CPU_HAS_AVX512_BF16)
  info["cpu_variants"] = "default avx2 avx512 avx512_bf16";
#elif defined(VK_CPU_HAS_X86_VARIANTS)
  info["cpu_variants"] = "default avx2 avx512";
#else
  info["cpu_variants"] = "default";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the build of vidkernels.";
  module.def("build_info", &build_info, "Compiler, CUDA toolkit, architectures, stems and commit of this build.");
}
