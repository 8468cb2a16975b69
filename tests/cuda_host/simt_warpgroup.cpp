// SPDX-License-Identifier: Apache-2.0
#include "simt_warpgroup.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "simt_block.h"

namespace simt {
namespace {

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  bool valid;

  void run() const {
    if (valid) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
};

// Phase `phase` ends when `missing` threads have arrived and what was expected has come.
struct Barrier {
  int count = 0, missing = 0;
  uint32_t phase = 0;
  int64_t expected = 0;  // bytes, less those whose copies have been started
  std::vector<Copy> copies;
};

// What a thread has started and not waited for, in groups; the last group is still open.
template <typename Item>
struct Groups {
  std::deque<std::vector<Item>> groups{1};

  void add(const Item& item) { groups.back().push_back(item); }
  void commit() { groups.emplace_back(); }
  // The items of all committed groups but the `left` newest.
  std::vector<Item> take(int left) {
    std::vector<Item> items;
    while (static_cast<int>(groups.size()) - 1 > left) {
      items.insert(items.end(), groups.front().begin(), groups.front().end());
      groups.pop_front();
    }
    return items;
  }
};

struct Thread {
  Groups<Copy> copies;
  std::vector<Copy> landed;  // waited for, but the async proxy does not see them yet
  Groups<Product> products;
};

std::map<const void*, Barrier> barriers;
std::map<int, Thread> threads;
uint64_t seen_block = 0;

// State of the block that runs now.
Thread& own() {
  if (seen_block != block_number()) {
    barriers.clear();
    threads.clear();
    seen_block = block_number();
  }
  return threads[thread_number()];
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: %s, block %u, thread %d\n", what, blockIdx.x, thread_number());
  std::abort();
}

Barrier& barrier_at(const void* address) {
  own();
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

bool early() {
  static std::mt19937 engine{7};
  return order() == Order::reverse || (order() == Order::shuffled && engine() % 2 == 0);
}

// Where an operand lies: cores of 8 rows by 8 values of 2 bytes.
struct Layout {
  uint32_t start, next_bytes, next_rows;

  Layout(uint64_t operand, int rows)
      : start(static_cast<uint32_t>(operand & 0x3fff) << 4),
        next_bytes(static_cast<uint32_t>(operand >> 16 & 0x3fff) << 4),
        next_rows(static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4) {
    constexpr uint64_t kFields = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32;
    if ((operand & ~kFields) != 0) fail("bits outside of an operand's fields");
    if (start + next_bytes + (rows / 8 - 1) * next_rows + 128 > dynamic_shared_bytes())
      fail("an operand that ends outside of shared memory");
  }
  const unsigned char* row(int r) const {
    return static_cast<const unsigned char*>(dynamic_shared()) + start + r / 8 * next_rows + r % 8 * 16;
  }
};

// 16 values of a row. Checked above, and too many for the sanitizer.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void read_row(const unsigned char* row,
                                                                                   uint32_t next_bytes,
                                                                                   const float* values, float* to) {
  for (int half = 0; half < 2; ++half) {
    const auto* bits = reinterpret_cast<const uint16_t*>(row + half * next_bytes);
    for (int k = 0; k < 8; ++k) to[8 * half + k] = values[bits[k]];
  }
}

__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) float dot(const float* a, const float* b) {
  float sum = 0.0f;
  for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
  return sum;
}

// This thread's part: row 16 warp + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e in sums[4 j + 2 h + e].
void compute(const Product& p) {
  const int warp = thread_number() % 128 / kLanes, row = 16 * warp + lane() / 4, column = 2 * (lane() % 4);
  const Layout rows(p.a, 64), columns(p.b, p.columns);
  float a[2][16], b[16];
  for (int h = 0; h < 2; ++h) read_row(rows.row(row + 8 * h), rows.next_bytes, p.values, a[h]);
  for (int j = 0; j < p.columns / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      read_row(columns.row(8 * j + column + e), columns.next_bytes, p.values, b);
      for (int h = 0; h < 2; ++h) {
        float& to = p.sums[4 * j + 2 * h + e];
        to = (p.add ? to : 0.0f) + dot(a[h], b);
      }
    }
  }
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.expected != 0) return;
  for (const Copy& copy : barrier.copies) copy.run();
  barrier.copies.clear();
  barrier.missing = barrier.count;
  ++barrier.phase;
  let_waiting_threads_go_on();
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               static_cast<const unsigned char*>(dynamic_shared()));
}

void barrier_init(const void* address, int count) {
  own();
  Barrier barrier;
  barrier.count = barrier.missing = count;
  barriers[address] = barrier;
}

void barrier_arrive(const void* address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address);
  if (--barrier.missing < 0) fail("more threads arrive at a barrier than it counts");
  barrier.expected += bytes;
  end_phase_if_complete(barrier);
}

void barrier_wait(const void* address, uint32_t parity) {
  while ((barrier_at(address).phase & 1) == (parity & 1)) yield();
}

void bulk_copy(void* to, const void* from, uint32_t bytes, const void* address) {
  if (bytes % 16 != 0 || shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a bulk copy that is not aligned to 16 bytes");
  Barrier& barrier = barrier_at(address);
  const Copy copy{to, from, bytes, true};
  if (early()) {
    copy.run();
  } else {
    barrier.copies.push_back(copy);
  }
  barrier.expected -= bytes;
  end_phase_if_complete(barrier);
}

void copy_16(void* to, const void* from, bool valid) {
  if (shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a copy of 16 bytes that is not aligned");
  own().copies.add({to, from, 16, valid});
}
void copy_commit() { own().copies.commit(); }
void copy_wait(int left) {
  for (const Copy& copy : own().copies.take(left)) own().landed.push_back(copy);
}
void fence_async_proxy() {
  for (const Copy& copy : own().landed) copy.run();
  own().landed.clear();
}

void multiply(const Product& product) {
  if (early()) {
    products_commit();
    products_wait(0);  // products are done in their order
    compute(product);
  } else {
    own().products.add(product);
  }
}
void products_commit() { own().products.commit(); }
void products_wait(int left) {
  for (const Product& product : own().products.take(left)) compute(product);
}

}  // namespace simt
