// SPDX-License-Identifier: Apache-2.0
// What the parts of the shim share: the block that runs, its threads, and who runs next.
#pragma once

#include <cstdint>

#include "simt.h"

namespace simt {

enum class Order { forward, reverse, shuffled };

Order order();
int thread_number();      // in its block
uint64_t block_number();  // of all blocks so far
size_t dynamic_shared_bytes();
// Back to the scheduler, until it picks this thread again.
void yield();
// Threads that wait may go on. With threads in order the first of them goes on at once, before others that could as
// well.
void let_waiting_threads_go_on();

}  // namespace simt
