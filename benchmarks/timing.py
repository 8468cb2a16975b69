# SPDX-License-Identifier: Apache-2.0
"""Timers. Contestants take turns, so that a change of clock or load hits all of them alike."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long one contestant of one case may be measured.

    A call above ``long_s`` averages over the machine's hiccups by itself. It has been warm since it was verified, so that
    its warm-up is its first sample, and more are taken until they add up to ``long_total_s``.
    """

    warmup_s: float = 0.3
    measure_s: float = 1.5
    rounds: int = 10
    min_samples: int = 5
    long_s: float = 5.0
    long_total_s: float = 20.0


QUICK = Budget(warmup_s=0.05, measure_s=0.25, rounds=5, min_samples=3)
FULL = Budget()
# Device events vary by 1 or 2 %, not by the 20 % of a shared CPU: 35 samples of a 10 ms call are plenty, and minutes are dear.
CUDA_FULL = Budget(warmup_s=0.1, measure_s=0.35, long_s=0.5, long_total_s=1.5)
CUDA_QUICK = dataclasses.replace(CUDA_FULL, warmup_s=0.05, measure_s=0.2, rounds=5, min_samples=3)


def budget(device: torch.device, quick: bool) -> Budget:
    """The budget of a kind of device."""
    if device.type == "cuda":
        return CUDA_QUICK if quick else CUDA_FULL
    return QUICK if quick else FULL


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median and the 20th and 80th percentiles of ``samples`` measurements."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))

    @property
    def noisy(self) -> bool:
        """More than 20 % between the percentiles: compare with care."""
        return self.p80 > 1.2 * self.p20


class CpuTimer:
    """Wall time by ``perf_counter``. Calls under 50 us are timed several at a time."""

    def warm_up(self, call: Call, limit: Budget) -> float:
        """Run for about ``warmup_s`` (at least once after a first call below ``long_s``) and return the fastest call in ms."""
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        if first > limit.long_s:
            return first * 1e3
        fastest, stop = math.inf, time.perf_counter() + limit.warmup_s
        while True:
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            fastest = min(fastest, end - start)
            if end >= stop:
                return fastest * 1e3

    def samples(self, call: Call, count: int, expected_ms: float) -> list[float]:
        inner = max(1, math.ceil(0.05 / max(expected_ms, 1e-4)))
        out = []
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            out.append((time.perf_counter() - start) * 1e3 / inner)
        return out


class CudaTimer:
    """Device events around each call, with the L2 cache overwritten before it (outside the timed region).

    The overwrite keeps the device busy while the host queues the call, so that what is timed is the device's work and
    not the host's, as long as queueing is the faster of the two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(max(4 * size, 256 << 20) // 4, dtype=torch.int32, device=device)

    def warm_up(self, call: Call, limit: Budget) -> float:
        """As the CPU's; the first call is waited for, so that a long one is measured by it."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        first = time.perf_counter() - start
        if first > limit.long_s:
            return first * 1e3
        fastest, stop = math.inf, time.perf_counter() + limit.warmup_s
        while True:
            fastest = min(fastest, *self.samples(call, 2, 0.0))
            if time.perf_counter() >= stop:
                return fastest

    def samples(self, call: Call, count: int, expected_ms: float) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def timer(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(calls: Mapping[str, Call], clock: CpuTimer | CudaTimer, limit: Budget) -> dict[str, Timing]:
    """Time all calls in turns: ``limit.rounds`` rounds, each contestant once a round."""
    estimates = {name: clock.warm_up(call, limit) for name, call in calls.items()}
    measured = {name: [ms] if ms > limit.long_s * 1e3 else [] for name, ms in estimates.items()}
    wanted = {
        name: math.ceil(limit.long_total_s * 1e3 / ms)
        if measured[name]
        else min(500, max(limit.min_samples, int(limit.measure_s * 1e3 / max(ms, 1e-3))))
        for name, ms in estimates.items()
    }
    for turn in range(limit.rounds):
        for name, call in calls.items():
            # what is due after this round, so that few samples are spread over the rounds too
            count = math.ceil(wanted[name] * (turn + 1) / limit.rounds) - len(measured[name])
            if count > 0:
                measured[name] += clock.samples(call, count, estimates[name])
    return {name: Timing.of(samples) for name, samples in measured.items()}


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: the allocator keeps what is freed on a stream for that stream alone."""
    return torch.cuda.Stream(device)


def _captured(prepare: Callable[[], Call], device: torch.device, repeats: int) -> torch.cuda.CUDAGraph:
    """A graph of ``repeats`` calls. Not by ``torch.cuda.graph``, which empties the allocator's cache before every capture."""
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        call = prepare()
        call()
        torch.cuda.synchronize(device)
        graph.capture_begin()
        try:
            for _ in range(repeats):
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(side)
    return graph


def graph_ms(prepare: Callable[[], Call], device: torch.device, repeats: int, replays: int = 20) -> float | None:
    """Median ms of one call when ``repeats`` of them are replayed from a CUDA graph; None if it cannot be captured.

    Args:
        prepare: Makes the call. It runs under the capturing stream: autograd runs a backward's kernels on the stream on
            which the forward ran, and one that ran on the default stream before would spoil the capture.
    """
    try:
        graph = _captured(prepare, device, repeats)
    except Exception:  # whatever a contestant does that a graph does not allow: it has its time by events
        torch.cuda.synchronize(device)
        return None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples = []
    for _ in range(replays + 2):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(start.elapsed_time(end) / repeats)
    return statistics.median(samples[2:])
