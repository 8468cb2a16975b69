# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call: bytes live at the worst moment beyond those live before it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of torch's allocator during ``call``, the results included and memory that existed before it not."""
    return _peak_cuda(call, device) if device.type == "cuda" else _peak_cpu(call)


def _peak_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def _peak_cpu(call: Callable[[], object]) -> int:
    """The profiler's memory events are the CPU allocator's calls in order; their running sum peaks where memory does.

    Scratch a library takes from malloc by itself (oneDNN's, a C++ vector) is not seen, in anybody's row.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
        del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
