// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace vidkernels {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Runs `function` over [begin, end) on torch's own thread pool (parallel.cpp); ranges hold at least `grain` items.
void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

// Threads that parallel_for may use, for kernels that keep one partial result per thread.
int64_t max_threads();

// f(begin, end) over disjoint ranges that cover [begin, end).
template <typename F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  auto call = [](int64_t range_begin, int64_t range_end, void* context) {
    (*static_cast<const F*>(context))(range_begin, range_end);
  };
  parallel_for_range(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace vidkernels
