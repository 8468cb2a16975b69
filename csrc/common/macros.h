// SPDX-License-Identifier: Apache-2.0
#pragma once

#if defined(__CUDACC__)
#define VK_HOST_DEVICE __host__ __device__ inline
#else
#define VK_HOST_DEVICE inline
#endif

// Kernel files are compiled once per instruction set; each copy lives in its own namespace so that the linker cannot
// merge an inline function compiled for AVX-512 into the code that older processors run.
#ifndef VK_CPU_CAPABILITY
#define VK_CPU_CAPABILITY cpu_default
#endif

#define VK_RESTRICT __restrict__
