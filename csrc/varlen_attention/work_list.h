// SPDX-License-Identifier: Apache-2.0
// Division of a packed batch into work items of very different cost, and their distribution over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "common/cpu.h"
#include "varlen_attention/varlen_attention.h"

namespace vidkernels {
inline namespace VK_CPU_CAPABILITY {

struct Segment {
  int64_t first_q, length_q, first_k, length_k;
};

// Queries of an item, `most` halved until there are a few items for each thread, or `fewest`: many pay for the packing
// of keys once, few keep all threads busy. No result depends on it.
inline int64_t rows_of_item(const VarlenAttentionShape& shape, int64_t fewest, int64_t most) {
  constexpr int64_t kItemsPerThread = 4;
  int64_t rows = most;
  for (; rows > fewest; rows /= 2) {
    int64_t items = 0;
    for (int64_t i = 0; i < shape.segments; ++i) {
      items += (shape.cu_seqlens_q[i + 1] - shape.cu_seqlens_q[i] + rows - 1) / rows * shape.heads_q;
    }
    if (items >= kItemsPerThread * max_threads()) break;
  }
  return rows;
}

// Segments in descending order of cost, each cut into query tiles of `tile` rows (tile = 0: one item per segment).
class WorkList {
 public:
  struct Item {
    Segment segment;
    int64_t first_row, rows;  // of the tile, relative to the segment
  };

  WorkList(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t segments, int64_t tile)
      : WorkList(cu_seqlens_q, cu_seqlens_k, segments, tile, [](const Segment&) { return true; }) {}

  // Of those segments alone that wanted(segment) names.
  template <typename Wanted>
  WorkList(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t segments, int64_t tile,
           const Wanted& wanted)
      : tile_(tile) {
    segments_.reserve(segments);
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t q = cu_seqlens_q[i], k = cu_seqlens_k[i];
      const Segment segment{q, cu_seqlens_q[i + 1] - q, k, cu_seqlens_k[i + 1] - k};
      if (wanted(segment)) segments_.push_back(segment);
    }
    // Long segments first: a thread that takes one last would keep the others waiting.
    std::stable_sort(segments_.begin(), segments_.end(), [](const Segment& a, const Segment& b) {
      return a.length_q * a.length_k > b.length_q * b.length_k;
    });
    first_item_.reserve(segments + 1);
    int64_t items = 0;
    for (const Segment& segment : segments_) {
      first_item_.push_back(items);
      items += tile == 0 ? 1 : (segment.length_q + tile - 1) / tile;
    }
    first_item_.push_back(items);
  }

  int64_t size() const { return first_item_.back(); }

  Item operator[](int64_t index) const {
    const auto after = std::upper_bound(first_item_.begin(), first_item_.end(), index);
    const int64_t position = after - first_item_.begin() - 1;
    const Segment& segment = segments_[position];
    if (tile_ == 0) return {segment, 0, segment.length_q};
    const int64_t first_row = (index - first_item_[position]) * tile_;
    return {segment, first_row, std::min(tile_, segment.length_q - first_row)};
  }

  int64_t max_length_k() const {
    int64_t longest = 0;
    for (const Segment& segment : segments_) longest = std::max(longest, segment.length_k);
    return longest;
  }

 private:
  int64_t tile_;
  std::vector<Segment> segments_;
  std::vector<int64_t> first_item_;
};

// One aligned allocation, handed out in pieces.
template <typename T>
class Arena {
 public:
  explicit Arena(int64_t elements) : data_(allocate(elements)), next_(data_.get()) {}

  T* take(int64_t elements) {
    T* piece = next_;
    next_ += (elements + kAlign - 1) / kAlign * kAlign;
    return piece;
  }

  static int64_t rounded(int64_t elements) { return (elements + kAlign - 1) / kAlign * kAlign; }

 private:
  static constexpr int64_t kAlign = 64 / static_cast<int64_t>(sizeof(T));
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  static T* allocate(int64_t elements) {
    void* pointer = std::aligned_alloc(64, std::max<int64_t>(rounded(elements), kAlign) * sizeof(T));
    if (pointer == nullptr) throw std::bad_alloc();
    return static_cast<T*>(pointer);
  }
  std::unique_ptr<T, Free> data_;
  T* next_;
};

// worker() makes one callable per thread, which is called with the items that this thread takes from a common counter.
// Which thread computes an item does not change its result.
template <typename MakeWorker>
void for_each_item(int64_t items, const MakeWorker& make_worker) {
  if (items == 0) return;
  // Sixteen takes per thread balance the load; one atomic addition then serves many short segments.
  const int64_t take = std::max<int64_t>(1, items / (max_threads() * 16));
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(max_threads(), items), 1, [&](int64_t, int64_t) {
    if (next.load(std::memory_order_relaxed) >= items) return;
    auto worker = make_worker();
    for (int64_t first = next.fetch_add(take); first < items; first = next.fetch_add(take)) {
      for (int64_t i = first; i < std::min(first + take, items); ++i) worker(i);
    }
  });
}

}  // namespace VK_CPU_CAPABILITY
}  // namespace vidkernels
