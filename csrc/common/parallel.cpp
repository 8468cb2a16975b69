// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include "common/stable.h"

namespace vidkernels {

void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  torch::stable::parallel_for(begin, end, grain, [function, context](int64_t range_begin, int64_t range_end) {
    function(range_begin, range_end, context);
  });
}

int64_t max_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

}  // namespace vidkernels
