# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels tune`: time every backend that can serve a shape, and remember the order for this machine.

Ops choose by these orders where there is one and by a named heuristic elsewhere; nothing is ever timed in a call.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from vidkernels import _measured, dispatch, ops
from vidkernels._commands._options import add_device, output_folder, positive
from vidkernels.ops._attention_engines import size_key
from vidkernels.ops._causal_conv3d_backends import shape_key

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Channels, filters, kernel, then frames, height and width: VidTok's and Wan's layers by their share of the time.
CONVOLUTIONS = (
    (128, 128, (1, 3, 3), (20, 256, 256)),
    (256, 256, (3, 3, 3), (20, 256, 256)),
    (128, 128, (3, 1, 1), (20, 256, 256)),
    (512, 512, (3, 3, 3), (5, 32, 32)),
    (128, 128, (3, 3, 3), (17, 256, 256)),
    (96, 96, (3, 3, 3), (21, 480, 832)),
    (192, 192, (3, 3, 3), (21, 240, 416)),
    (384, 384, (3, 3, 3), (11, 120, 208)),
    (3, 128, (3, 3, 3), (17, 256, 256)),
    (128, 3, (3, 3, 3), (17, 256, 256)),
)
# Head dimension, heads, tokens of a segment, segments.
ATTENTIONS = (
    (64, 16, 256, 64), (64, 16, 4096, 4), (72, 16, 256, 64), (72, 16, 4096, 4),
    (128, 12, 512, 32), (128, 12, 8192, 2), (128, 12, 32768, 1),
)  # fmt: skip
ROUNDS = 3
# Of the largest value: two right results in 16 bits are 2^-8 of it apart, sums with a part missing far more.
_AGREEMENT = 2.0**-6


@dataclass(frozen=True)
class Subject:
    """One shape of one op: the key it is filed under and a maker of the op's arguments."""

    op: str
    key: str
    make: Callable[[], Arguments]


def _convolutions(device: torch.device, dtype: torch.dtype, shrink: int) -> Iterator[Subject]:
    options: dict[str, Any] = {"device": device, "dtype": dtype}

    def make(channels: int, filters: int, kernel: tuple[int, ...], size: tuple[int, ...]) -> Arguments:
        x = torch.randn(1, channels, *size, **options).contiguous(memory_format=torch.channels_last_3d)
        weight = 0.02 * torch.randn(filters, channels, *kernel, **options)
        return (x, weight, torch.randn(filters, **options)), {"spatial_padding": (kernel[1] // 2, kernel[2] // 2)}

    for channels, filters, kernel, (frames, height, width) in CONVOLUTIONS:
        size = (frames, height // shrink, width // shrink)
        key = shape_key(channels, filters, kernel, (1, 1, 1), dtype)
        yield Subject("causal_conv3d", key, partial(make, channels, filters, kernel, size))


def _attentions(device: torch.device, dtype: torch.dtype, shrink: int) -> Iterator[Subject]:
    if device.type != "cuda":  # one backend serves a CPU
        return

    def make(dim: int, heads: int, length: int, segments: int) -> Arguments:
        tokens = (torch.randn(length * segments, heads, dim, device=device, dtype=dtype) for _ in range(3))
        offsets = torch.arange(0, (segments + 1) * length, length, dtype=torch.int32, device=device)
        return (*tokens, offsets, None, length), {}

    for dim, heads, length, segments in ATTENTIONS:
        yield Subject("varlen_attention", size_key(dim, length, dtype), partial(make, dim, heads, length, segments))


SUBJECTS = {"causal_conv3d": _convolutions, "varlen_attention": _attentions}


def _agreeing(function: Callable[..., Any], arguments: Arguments, names: Sequence[str]) -> list[str]:
    """Backends whose result is torch's; others are named and left out, however fast. The first call compiles."""
    args, kwargs = arguments
    if "torch" not in names:
        return list(names)
    wanted = function(*args, backend="torch", **kwargs)
    limit, kept = _AGREEMENT * wanted.abs().max(), []
    for name in names:
        error = (function(*args, backend=name, **kwargs) - wanted).abs().max()
        if error <= limit:
            kept.append(name)
        else:
            print(
                f"left out: {name} is {error:.3g} from torch's result, whose largest value is {limit / _AGREEMENT:.3g}"
            )
    return kept


@torch.no_grad()
def measure(subject: Subject, seconds: float) -> dict[str, float]:
    """Backend -> median seconds of a forward call, backends taking turns; only those that serve the shape, and rightly."""
    args, kwargs = subject.make()
    function = getattr(ops, subject.op)
    explanation = dispatch.dispatchers()[subject.op].explain(*args, **kwargs)
    names = [
        choice.backend for choice in explanation.choices if choice.reason is None and choice.backend != "reference"
    ]
    names = _agreeing(function, (args, kwargs), names)
    timers = {
        name: Timer(
            "f(*args, backend=name, **kwargs)", globals={"f": function, "args": args, "kwargs": kwargs, "name": name}
        )
        for name in names
    }
    samples: dict[str, list[float]] = {name: [] for name in names}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            samples[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
    return {name: statistics.median(times) for name, times in samples.items()}


def tune(
    names: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype], seconds: float, folder: Path
) -> list[Path]:
    """Measure, print a line per shape, and write `folder/<op>.json` after each op; returns these files."""
    folder.mkdir(parents=True, exist_ok=True)  # an unwritable folder is known before minutes are spent
    written = []
    # The whole frames take seconds a call on a CPU; an eighth of the height and width is still 30 pixels and more.
    shrink = 1 if device.type == "cuda" else 8
    for op in names:
        orders: dict[str, list[str]] = {}
        getattr(ops, op)
        for subject in (s for dtype in dtypes for s in SUBJECTS[op](device, dtype, shrink)):
            times = measure(subject, seconds)
            orders[subject.key] = sorted(times, key=times.__getitem__)
            row = ", ".join(f"{name} {times[name] * 1e3:.3g} ms" for name in orders[subject.key])
            print(f"{op} {subject.key}: {row}", flush=True)
        if orders:
            written.append(folder / f"{op}.json")
            _measured.write(written[-1], op, _measured.device_name(device), orders)
    _measured.forget()
    return written


def main(argv: Sequence[str]) -> int:
    """The command line."""
    text = "Time every backend that can serve a shape, and remember the order for this machine."
    parser = argparse.ArgumentParser(prog="vidkernels tune", description=text)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"one or more of {', '.join(SUBJECTS)}; default: all")
    add_device(parser)
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=dtypes, help="default: bfloat16")
    parser.add_argument("--seconds", type=positive, default=0.6, help="time for each backend and shape; default: 0.6")
    parser.add_argument(
        "--out", type=output_folder, help=f"folder of the JSON files; default: {_measured.cache_folder()}"
    )
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.ops) - set(SUBJECTS))
    if unknown:
        parser.error(f"op: expected one of {', '.join(SUBJECTS)}, got {', '.join(unknown)}")
    chosen = [getattr(torch, name) for name in arguments.dtype]
    place = arguments.out or _measured.cache_folder()
    files = tune(arguments.ops or list(SUBJECTS), arguments.device, chosen, arguments.seconds, place)
    for path in files:
        print(f"written to {path}")
    if not files:
        print(f"nothing was written: on {arguments.device} there is one backend for each of these shapes")
    return 0
