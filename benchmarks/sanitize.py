# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.sanitize memcheck``: compute-sanitizer over every op's kernels of one backend, both directions.

Sizes are odd: tiles that end inside a tensor, rows that vectors do not fit, views that begin at an odd element. torch's
caching allocator is off: within one of its blocks of 2 MB the tool sees no end of a tensor. Fails where the tool reports
anything, where a result is wrong, and where the process was killed before it had made every call. ``--plain`` makes the
same calls without the tool, on any device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import machine
from vidkernels._commands import doctor
from vidkernels._commands.samples import Sample, samples

# What a GPU's backends are called in `explain`.
BACKENDS = {"cuda": {"cuda"}, "triton": {"triton", "triton-short"}, "cpp": {"cpp"}}
# Errors of API calls are the driver's bindings asking which functions there are: 34 of them, and none of a kernel.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": ()}
CLEAN = re.compile(r"SUMMARY: 0 (errors|hazards)")
# Bytes that nothing owns behind every allocation, where the tool knows the option.
PADDING = 512
LAST = "all calls were made"

Draw = Callable[..., Tensor]


def _quantizers(draw: Draw) -> Iterator[Sample]:
    levels = [8, 8, 8, 5, 5, 5]
    video = draw(2, 6, 3, 19, 23)
    shifted = draw(2 * 331 * 6 + 1)[1:].view(2, 331, 6)  # no vector of 16 bytes begins here
    for z, dim in ((video, 1), (video.contiguous(memory_format=torch.channels_last_3d), 1), (shifted, 2)):
        yield Sample("fsq_quantize", (z, levels), {"dim": dim})
    yield Sample("fsq_quantize", (draw(3, 1237, 4), [4, 17]), {"bound": "symmetric", "num_codebooks": 2})
    indices = torch.arange(3 * 331, dtype=torch.int32, device=video.device).reshape(3, 331)
    yield Sample("fsq_indices_to_codes", (indices, levels))
    for spherical in (False, True):
        yield Sample("lfq_quantize", (draw(2, 18, 3, 19, 23),), {"dim": 1, "spherical": spherical})
        yield Sample("lfq_quantize", (draw(3, 1237, 7),), {"spherical": spherical})
    yield Sample("lfq_indices_to_codes", (indices.long(), 18))


def _norms_and_blends(draw: Draw) -> Iterator[Sample]:
    for channels, kind in ((20, "layer"), (128, "layer"), (384, "rms"), (1030, "layer")):
        x = draw(1, channels, 3, 9, 11)
        affine = draw(channels), draw(channels)
        for layout in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            given = (layout, *affine) if kind == "layer" else (layout, affine[0])
            yield Sample("channel_norm", given, {"kind": kind, "activation": "silu"})
    x = draw(1, 24, 5, 9, 11)
    for format_ in (torch.contiguous_format, torch.channels_last_3d):
        y = x.contiguous(memory_format=format_)
        yield Sample("alpha_blend", (y, draw(*x.shape).contiguous(memory_format=format_), draw(1)))
        yield Sample("alpha_blend_down", (y, draw(1, 24, 2, 9, 11).contiguous(memory_format=format_), draw(1)))
        yield Sample("alpha_blend_up", (y, draw(1, 24, 10, 9, 11).contiguous(memory_format=format_), draw(1)))
    yield Sample("gated_activation", (draw(3, 37, 2 * 101),))
    yield Sample("gated_activation", (draw(3, 37, 2 * 1160),))
    yield Sample("group_norm", (draw(1, 96, 3, 9, 11), 32, draw(96), draw(96)), {"activation": "silu"})


def _transformers(draw: Draw) -> Iterator[Sample]:
    for channels in (40, 101, 1152, 3072):
        x, branch = draw(2, 37, channels), draw(2, 37, channels)
        gate, shift, scale = (draw(2, channels) for _ in range(3))
        yield Sample("adaln_modulate", (x, shift, scale))
        yield Sample("gate_residual", (x, branch, gate))
        yield Sample("adaln_zero", (x, branch, gate, shift, scale))
    lengths = torch.tensor([0, 9, 10, 74], dtype=torch.int32, device=x.device)
    packed, rows = [draw(74, 264) for _ in range(2)], [draw(3, 264) for _ in range(3)]
    yield Sample("adaln_zero", (*packed, *rows), {"cu_seqlens": lengths})
    positions = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (2, 3, 5)))
    q, k = draw(3, 30, 3, 64), draw(3, 30, 2, 64)
    weights = draw(64), draw(64)
    yield Sample("qk_norm_rope", (q, k, *weights, positions), {"axes": (16, 24, 24)})
    yield Sample("qk_norm_rope", (q, k, *weights, positions), {"axes": (16, 24, 24), "layout": "half"})
    full = draw(2, 30, 5, 128), draw(2, 30, 5, 128), draw(640), draw(640), positions
    yield Sample("qk_norm_rope", full, {"norm": "full", "axes": (44, 42, 42)})
    attention = [draw(74, 3, 72) for _ in range(3)]
    yield Sample("varlen_attention", (*attention, lengths, lengths, 64, 64))
    yield Sample("axial_attention", (*[draw(2, 17, 21, 2, 72) for _ in range(3)], 1))


def _convolutions(draw: Draw) -> Iterator[Sample]:
    shapes = [
        (40, 96, (3, 3, 3)),
        (64, 80, (3, 3, 3)),
        (128, 128, (1, 3, 3)),
        (64, 64, (3, 1, 1)),
        (3, 96, (3, 3, 3)),
        (96, 3, (3, 3, 3)),
    ]
    for channels, filters, kernel in shapes:
        x = draw(1, channels, 4, 13, 17).contiguous(memory_format=torch.channels_last_3d)
        yield Sample("causal_conv3d", (x, 0.05 * draw(filters, channels, *kernel), draw(filters)))
    x = draw(1, 64, 3, 9, 11).contiguous(memory_format=torch.channels_last_3d)
    yield Sample("upsample_conv3d", (x, 0.05 * draw(64, 64, 3, 3, 3), draw(64)), {"scale": (2, 2, 2)})


def odd_samples(device: torch.device, dtype: torch.dtype, backend: str) -> list[Sample]:
    """The calls, the same numbers every time; those of `doctor` too, which know every op."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    found = [*samples(device, dtype), *_quantizers(draw), *_norms_and_blends(draw), *_transformers(draw)]
    return found if backend == "cpp" else [*found, *_convolutions(draw)]


def make_calls(device: torch.device, backend: str) -> int:
    """Every call once forward and backward in float32 and bfloat16; how many were wrong or failed, 1 if none was made."""
    good = bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        found = doctor.examine(device, dtype, BACKENDS[backend], odd_samples(device, dtype, backend))
        for verdict in found:
            good += verdict.verdict == "ok"
            bad += verdict.bad
            if verdict.bad:
                print(f"{verdict.op} {verdict.backend} {dtype}: {verdict.verdict}")
        print(f"{dtype}: {len(found)} calls in {time.perf_counter() - start:.1f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{LAST}: {good} right, {bad} bad", flush=True)
    return bad or int(not good)


def _command(tool: str) -> list[str]:
    options = list(TOOLS[tool])
    if tool == "memcheck":
        known = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, check=False).stdout
        options += ["--padding", str(PADDING)] if "--padding" in known else []
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options]


def check(tool: str, backend: str, device: str) -> int:
    """Run the calls under the tool; 0 only if they all were made, are right, and the tool's summary counts nothing."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH", file=sys.stderr)
        return 2
    calls = [sys.executable, "-m", "benchmarks.sanitize", "--plain", "--backend", backend, "--device", device]
    if backend == "triton" and (code := subprocess.call(calls, cwd=machine.ROOT)):
        return code  # wrong already without the tool; else what the compiler made waits in Triton's cache
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*_command(tool), *calls],
        cwd=machine.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    made = clean = False
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        made |= line.startswith(LAST)
        clean |= CLEAN.search(line) is not None
    code = process.wait()
    faults = [] if made else ["the process ended before it had made every call"]
    faults += [] if clean else ["no summary of the tool that counts nothing"]
    faults += [f"exit code {code}"] if code else []
    print(f"{tool}, {backend}: {'; '.join(faults) or 'clean'}")
    return int(bool(faults))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tool", nargs="?", choices=list(TOOLS), default="memcheck")
    parser.add_argument("--backend", choices=list(BACKENDS), default="cuda")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--plain", action="store_true", help="the calls alone, without the tool")
    arguments = parser.parse_args(argv)
    if arguments.plain:
        return min(1, make_calls(torch.device(arguments.device), arguments.backend))
    return check(arguments.tool, arguments.backend, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
