# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks run --compile-only``: pays for compilers in several processes, before anything is timed.

torch.compile needs 10 to 20 s of one core for a case, and leaves its result in caches on disk, as Triton does. Each worker
calls the contestants of its cases once, exactly as the verification of a timed run will, which then finds them compiled.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import registry, runner, verify
from benchmarks.registry import Case


def call_once(case: Case, settings: runner.Settings) -> list[str]:
    """Call every contestant but plain eager, which compiles nothing. Returns a line for each that failed."""
    failed = []
    with runner.compiler_settings(settings):
        for name, function in runner.contestants(case, settings).items():
            if name == runner.EAGER:
                continue
            try:
                if name == runner.COMPILE and case.compile is True:
                    # What it builds at its first call must be there: torch.compile would trace the building, and fail.
                    verify.evaluate(case.reference, verify.make_inputs(case), bool(case.backward))
                verify.evaluate(function, verify.make_inputs(case), bool(case.backward))
                if settings.device.type == "cuda":
                    torch.cuda.synchronize(settings.device)
            except Exception as error:  # the timed run will say so in its row; the others still profit
                failed.append(f"{name}: {runner.one_line(error)}")
    runner.free_memory(settings.device, always=True)  # the workers share a GPU's memory
    return failed


def _start_worker(compiles: bool, stems: Sequence[str]) -> None:
    registry.load(stems)
    if compiles:
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # the workers are the parallelism; it is no part of the caches' keys


@functools.cache
def _cases(stem: str, settings: runner.Settings) -> dict[str, Case]:
    return {case.name: case for case in runner.chosen(stem, settings)}


def _work(stem: str, name: str, settings: runner.Settings) -> tuple[float, list[str]]:
    """What a worker does: (seconds, failures). Cases hold functions and cannot be sent, so it lists them itself."""
    start = time.perf_counter()
    failed = call_once(_cases(stem, settings)[name], settings)
    return time.perf_counter() - start, failed


def run(
    stems: Sequence[str], settings: runner.Settings, workers: int, end: float, say: Callable[[str], None]
) -> tuple[int, int]:
    """Share the cases of the stems among worker processes. Returns (cases called, cases of them that failed).

    Args:
        end: time.monotonic() from which on no case is begun, but those that the workers have already.
    """
    wanted = [(stem, case.name) for stem in stems for case in runner.chosen(stem, settings)]
    faulty = 0
    start = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with concurrent.futures.ProcessPoolExecutor(workers, start, _start_worker, (settings.compile, stems)) as pool:
        waiting = {pool.submit(_work, stem, name, settings): name for stem, name in wanted}

        def tell(future: concurrent.futures.Future[tuple[float, list[str]]]) -> bool:
            try:
                seconds, failed = future.result()
            except Exception as error:  # a worker that died, or a list of cases that cannot be made there
                seconds, failed = 0.0, [runner.one_line(error)]
            say("\n    ".join([f"  {waiting[future]}: {seconds:.1f} s", *failed]))
            return bool(failed)

        told = set()
        try:
            # no limit of threading's is infinite
            for future in concurrent.futures.as_completed(waiting, max(0.0, min(end - time.monotonic(), 86400.0))):
                told.add(future)
                faulty += tell(future)
        except concurrent.futures.TimeoutError:
            pool.shutdown(wait=True, cancel_futures=True)
            late = {future for future in waiting if not future.cancelled()}
            faulty += sum(tell(future) for future in late - told)
            told |= late
    return len(told), faulty
