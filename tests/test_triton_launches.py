# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel as its launcher starts it on an H100: it compiles, fits, does not spill, and is compiled once for all
sizes of clip and sequence. The interpreter shows none of this: it ran kernels that the compiler refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import launches
import pytest
import torch

from vidkernels import ops

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
LEVELS = [8, 8, 8, 5, 5, 5]
BF16, F32 = torch.bfloat16, torch.float32
TRITON: dict[str, Any] = {"backend": "triton"}
LAST = torch.channels_last_3d


def tensor(*size: int, dtype: torch.dtype = BF16, odd: bool = False) -> torch.Tensor:
    """A leaf without memory; `odd` begins one element behind an aligned address."""
    x = torch.empty(int(torch.Size(size).numel()) + odd, device="meta", dtype=dtype)[int(odd) :].view(size)
    return x.requires_grad_(dtype.is_floating_point)


def offsets(segments: int) -> torch.Tensor:
    return torch.empty(segments + 1, device="meta", dtype=torch.int32)


def quantizer(function: Callable[..., Any], *rest: Any, planar: bool = False, **options: Any) -> None:
    x = tensor(2, 18 if "lfq" in function.__name__ else 6, 5, 16, 16)
    x = x if planar else x.movedim(1, -1)
    function(x, *rest, dim=1 if planar else -1, **options, **TRITON)[0].sum().backward()


def rows(function: Callable[..., Any], size: tuple[int, ...], tables: int, **options: Any) -> None:
    activations = [tensor(*size, odd=options.pop("odd", False))] * (2 if function is not ops.adaln_modulate else 1)
    made = function(*activations, *[tensor(size[0], size[-1])] * tables, **options, **TRITON)
    sum(y.sum() for y in (made if isinstance(made, tuple) else (made,))).backward()


def conv(
    channels: int,
    filters: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    dtype: torch.dtype = BF16,
    **options: Any,
) -> None:
    x = tensor(1, channels, *size, dtype=dtype).to(memory_format=LAST)
    if "P" in options:
        options["history"] = tensor(1, channels, options.pop("P"), *size[1:], dtype=dtype).to(memory_format=LAST)
    weight, bias = tensor(filters, channels, *kernel, dtype=dtype), tensor(filters, dtype=dtype)
    made = ops.causal_conv3d(x, weight, bias, **options, **TRITON)
    (made[0] if isinstance(made, tuple) else made).sum().backward()


def norm(kind: str, channels: int, last: bool, dtype: torch.dtype = BF16) -> None:
    x = tensor(2, channels, 3, 16, 16, dtype=dtype)
    x, weight = x.to(memory_format=LAST) if last else x, tensor(channels, dtype=dtype)
    ops.channel_norm(
        x, weight, weight if kind == "layer" else None, kind=kind, activation="silu", **TRITON
    ).sum().backward()


def group_norm(channels: int, groups: int, last: bool, per_frame: bool, dtype: torch.dtype = BF16) -> None:
    x = tensor(2, channels, 3, 64, 64, dtype=dtype)
    x, weight = x.to(memory_format=LAST) if last else x, tensor(channels, dtype=dtype)
    options = {"activation": "silu", "per_frame": per_frame, **TRITON}
    ops.group_norm(x, groups, weight, weight, **options).sum().backward()


def heads(norm: str | None, layout: str, head_dim: int, axes: tuple[int, ...], tokens: int = 100) -> None:
    q = tensor(1, tokens, 12, head_dim)
    weight = None if norm is None else tensor(head_dim * (12 if norm == "full" else 1))
    positions = torch.empty(tokens, 3, device="meta", dtype=torch.int64)
    made = ops.qk_norm_rope(q, q, weight, weight, positions, axes=axes, norm=norm, layout=layout, **TRITON)
    (made[0].sum() + made[1].sum()).backward()


def attend(
    head_dim: int, causal: bool = False, dtype: torch.dtype = BF16, longest: int = 2048, total: int = 4096
) -> None:
    q, cu = tensor(total, 8, head_dim, dtype=dtype), offsets(4)
    options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": causal}
    ops.varlen_attention(q, q, q, cu, cu, **options, **TRITON).sum().backward()


def over_time(head_dim: int, frames: int = 16) -> None:
    q = tensor(2, frames, 64, 12, head_dim)
    ops.axial_attention(q, q, q, dim=1, **TRITON).sum().backward()


def blend(function: Callable[..., Any], frames: int, made: int, **options: Any) -> None:
    x, b, mix = tensor(1, 16, frames, 16, 16), tensor(1, 16, made, 16, 16), tensor(1, dtype=F32)
    function(x, b, mix, **options, **TRITON).sum().backward()


CASES: dict[str, Callable[[], Any]] = {
    "fsq": lambda: quantizer(ops.fsq_quantize, LEVELS),
    "fsq decode": lambda: ops.fsq_indices_to_codes(
        torch.empty(3, 5, 7, device="meta", dtype=torch.int32), LEVELS, dim=-1, **TRITON
    ),
    "lfq": lambda: quantizer(ops.lfq_quantize),
    "lfq decode": lambda: ops.lfq_indices_to_codes(
        torch.empty(3, 5, 7, device="meta", dtype=torch.int64), 18, dim=-1, **TRITON
    ),
    "adaln": lambda: rows(ops.adaln_zero, (2, 100, 1152), 3),
    "conv 100-36": lambda: conv(100, 36, (3, 3, 3), (3, 9, 11)),
}
SLOW: dict[str, Callable[[], Any]] = {
    "fsq planar": lambda: quantizer(ops.fsq_quantize, LEVELS, planar=True),
    "fsq encode": lambda: ops.fsq_codes_to_indices(tensor(13, 6), LEVELS, dim=-1, **TRITON),
    "bsq": lambda: quantizer(ops.lfq_quantize, spherical=True),
    "lfq encode": lambda: ops.lfq_codes_to_indices(tensor(13, 18), dim=-1, **TRITON),
    "adaln odd": lambda: rows(ops.adaln_zero, (2, 100, 1152), 3, odd=True),
    "adaln 5120": lambda: rows(ops.adaln_zero, (2, 100, 5120), 3),
    "modulate packed": lambda: (
        ops.adaln_modulate(tensor(200, 1152), tensor(4, 1152), tensor(4, 1152), cu_seqlens=offsets(4), **TRITON)
        .sum()
        .backward()
    ),
    "gate": lambda: rows(ops.gate_residual, (2, 100, 3072), 1),
    "gated odd": lambda: ops.gated_activation(tensor(3, 50, 2 * 1365), **TRITON).sum().backward(),
    "gated float32": lambda: ops.gated_activation(tensor(70, 2 * 4608, dtype=F32), "silu", **TRITON).sum().backward(),
    "blend": lambda: blend(ops.alpha_blend, 4, 4),
    "blend down": lambda: blend(ops.alpha_blend_down, 4, 2),
    "blend up": lambda: blend(ops.alpha_blend_up, 4, 8, mode="linear"),
    **{
        f"norm {kind} {channels} {'rows' if last else 'planes'}": (
            lambda kind=kind, channels=channels, last=last: norm(kind, channels, last)
        )
        for kind, channels in (("layer", 96), ("layer", 512), ("rms", 1024), ("l2", 128))
        for last in (True, False)
    },
    **{
        f"heads {norm} {layout} {head_dim}": (
            lambda norm=norm, layout=layout, head_dim=head_dim, axes=axes: heads(norm, layout, head_dim, axes)
        )
        for norm, layout in (("head", "interleaved"), ("head", "half"), ("full", "interleaved"), (None, "half"))
        for head_dim, axes in ((64, (16, 24, 24)), (128, (44, 42, 42)))
    },
    "group norm rows float32": lambda: group_norm(128, 32, True, True, F32),
    "group norm planes": lambda: group_norm(128, 32, False, True),
    "group norm clip 384": lambda: group_norm(384, 32, True, False),
    "group norm one group": lambda: group_norm(512, 1, True, False),
    "attention 72": lambda: attend(72),
    "attention 128 causal": lambda: attend(128, causal=True),
    "attention 256": lambda: attend(256),
    "attention 256 float32": lambda: attend(256, dtype=F32),
    "attention short": lambda: attend(64, longest=60),
    "over time 64": lambda: over_time(64),
    "over time 72": lambda: over_time(72),
    "over time 17": lambda: over_time(64, 17),
    "conv 3-128": lambda: conv(3, 128, (3, 3, 3), (3, 64, 64)),
    "conv 128-3": lambda: conv(128, 3, (3, 3, 3), (3, 64, 64)),
    "conv 128 float32": lambda: conv(128, 128, (3, 3, 3), (3, 64, 64), F32),
    "conv down": lambda: conv(128, 128, (1, 3, 3), (3, 64, 64), stride=(1, 2, 2), spatial_padding=(0, 1, 0, 1)),
    "conv replicate": lambda: conv(
        64, 64, (3, 3, 3), (3, 32, 32), time_padding="replicate", spatial_padding_mode="replicate"
    ),
    "conv history": lambda: conv(64, 64, (3, 3, 3), (3, 32, 32), P=2, time_padding="history"),
}
LARGE: dict[str, Callable[[], Any]] = {
    "fsq": lambda: ops.fsq_quantize(tensor(1, 6, 700, 1024, 1024), LEVELS, dim=1, **TRITON),
    "adaln": lambda: rows(ops.adaln_zero, (2, 500_000, 3072), 3),
    "blend": lambda: ops.alpha_blend(tensor(1, 128, 70, 512, 512), tensor(1, 128, 70, 512, 512), tensor(1), **TRITON),
    "attention": lambda: attend(128, longest=500_000, total=3_000_000),
    "conv": lambda: conv(128, 128, (3, 3, 3), (60, 512, 640)),
    "conv, large frames": lambda: conv(512, 512, (1, 3, 3), (2, 2200, 2200)),
}


def check(found: list[launches.Launch]) -> None:
    assert found
    for launch in launches.compilations(found):
        # The assembler sometimes spends a few bytes on more blocks a multiprocessor, far from the limit of registers.
        limit = min(255, 65536 // (32 * launch.num_warps) // 8 * 8)
        chosen = launch.report.registers <= limit // 2 and launch.report.spills <= 32
        assert launch.report.spills == 0 or chosen, (launch.kernel, launch.report.registers, launch.report.spills)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_forward_and_backward_compile_without_spills(name: str) -> None:
    with launches.record() as found:
        {**CASES, **SLOW}[name]()
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_beyond_32_bits(name: str) -> None:
    """Grids and int32 arguments stay within their limits (`launches` checks both)."""
    with launches.record() as found:
        LARGE[name]()
    check(found)


# Kernels without taps in space have a smaller tile: an H100 took 283 us where the other one took 333.
CLIPS = {
    "space": (
        ((3, 3, 3), (1, 256, 256)),
        ((3, 3, 3), (17, 256, 256)),
        ((1, 3, 3), (5, 208, 256)),
        ((1, 2, 2), (4, 160, 512)),
    ),
    "time": (((3, 1, 1), (1, 256, 256)), ((3, 1, 1), (16, 256, 512)), ((2, 1, 1), (5, 208, 256))),
}


@pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS.keys())
def test_one_compilation_serves_all_clips(clips: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> None:
    """Frames, rows, columns, kernels and chunks of a convolution; only tiles differ from size to size."""
    with launches.record() as found:
        for kernel, size in clips:
            x, weight = tensor(1, 128, *size).to(memory_format=LAST), tensor(128, 128, *kernel)
            ops.causal_conv3d(x.detach(), weight.detach(), **TRITON)
    assert len(found) == len(clips)
    assert len(launches.compilations(found)) == 1


@pytest.mark.slow
def test_one_compilation_serves_all_sequences() -> None:
    with launches.record() as found:
        for tokens in (64, 1000, 4096, 4097):
            attend(64, total=tokens)
            rows(ops.adaln_zero, (2, tokens, 1152), 3)
            heads("head", "interleaved", 64, (16, 24, 24), tokens)
    kernels = [launch.kernel for launch in launches.compilations(found)]
    assert len(kernels) == len(set(kernels)), kernels


def test_descriptors_that_the_copy_engine_refuses() -> None:
    """The stand-in for cuTensorMapEncodeTiled notices what a device would."""
    good = (0, 3, 2, 10, [1, 64], [5, 128], [128, 1], 0)
    assert launches.check_tensor_map(*good)
    for place, value in ((0, 8), (4, [1, 512]), (4, [1, 128]), (4, [1, 4]), (6, [100, 1]), (5, [2**31, 128])):
        with pytest.raises(AssertionError):
            launches.check_tensor_map(*good[:place], value, *good[place + 1 :])
