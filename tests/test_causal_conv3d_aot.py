# SPDX-License-Identifier: Apache-2.0
"""Machine code of the convolution kernels at the tiles that the models' shapes choose: no spills, matrix instructions,
bulk tensor copies of boxes on sm_90 and sm_100, 16-byte loads elsewhere."""

from __future__ import annotations

import re
from typing import Any

import aot
import pytest
import torch

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTC", "HMMA"), "gfx942": ("v_mfma",)}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# name: channels, filters, kernel, height, width (VidTok at 256 x 256, Wan at 480 x 832 and 704 x 1280)
SHAPES: dict[str, tuple[int, int, tuple[int, int, int], int, int]] = {
    "128 1x3x3": (128, 128, (1, 3, 3), 256, 256),
    "256 3x3x3": (256, 256, (3, 3, 3), 128, 128),
    "128 3x1x1": (128, 128, (3, 1, 1), 256, 256),
    "512 3x3x3": (512, 512, (3, 3, 3), 32, 32),
    "32 3x3x3": (512, 32, (3, 3, 3), 32, 32),
    "96 3x3x3": (96, 96, (3, 3, 3), 480, 832),
    "160 3x3x3": (160, 160, (3, 3, 3), 352, 640),
    "160 1x3x3": (160, 160, (1, 3, 3), 33, 20),
    "192 1x3x3": (192, 192, (1, 3, 3), 48, 80),
    "192 3x3x3": (192, 192, (3, 3, 3), 240, 416),
    "384 3x3x3": (384, 384, (3, 3, 3), 60, 104),
    "3-128 3x3x3": (3, 128, (3, 3, 3), 256, 256),
    "128-3 3x3x3": (128, 3, (3, 3, 3), 256, 256),
}


def _constants(
    function: Any, kernel: tuple[int, int, int], step: int, dtype: torch.dtype, full: bool
) -> dict[str, Any]:
    names = dict(zip(("KT", "KH", "KW"), kernel, strict=True))
    steps = {"STEP_T": step, "STEP_H": step, "STEP_W": step, "MUL_T": 1}
    sizes = {name: value for name, value in {**names, **steps}.items() if name in function.arg_names}
    return {**sizes, "UPCAST": False, "PRECISION": "ieee" if full and dtype == torch.float32 else "tf32"}


def _types(
    function: Any, constants: dict[str, Any], given: dict[str, str], channels: int, filters: int
) -> dict[str, str]:
    """Arguments as launches specialise them: strides of 16 channels are divisible by 16."""
    counts = {
        "channels": channels,
        "s": channels,
        "p": channels,
        "filters": filters,
        "y": filters,
        "r": filters,
        "g": filters,
    }
    signature = {}
    for name in (n for n in function.arg_names if n not in constants):
        specialised = name not in function.do_not_specialize
        even = specialised and counts.get(name.partition("_")[0], 1) % 16 == 0
        signature[name] = given.get(name, "i32:16" if even else "i32")
    return signature


def report(
    kind: str,
    name: str,
    target: str,
    dtype: torch.dtype = torch.bfloat16,
    history: bool = False,
    full: bool = False,
    boxed: bool = True,
) -> aot.Report:
    """Compile what a launch of `kind` (fwd, dgrad, wgrad) on a shape would."""
    from vidkernels.triton import _conv_configs as configs
    from vidkernels.triton import _conv_kernels as kernels
    from vidkernels.triton import _conv_wgrad

    channels, filters, kernel, height, width = SHAPES[name]
    if kind == "dgrad":
        channels, filters = filters, channels
    gpu, element = "amd" if target == "gfx942" else target, NAMES[dtype]
    boxes = target in ("sm_90", "sm_100") and channels >= 16 and not full and boxed
    boxes = boxes and (kind != "wgrad" or filters >= 8)
    pointer = f"*{element}:16"
    if kind == "wgrad":
        config: Any = (
            configs.wgrad_box_config(dtype, channels, filters, height, width, target)
            if boxes
            else configs.pointer_config(dtype, channels, filters, gpu, wgrad=True)
        )
        function = _conv_wgrad._wgrad_box_kernel if boxes else _conv_wgrad._wgrad_pointer_kernel
        given = {"grad": pointer, "source": pointer, "partial": "*fp32:16"}
        constants = {"CLAMP_LOWER": False, "CLAMP_UPPER": False}
    else:
        config = (
            configs.box_config(dtype, channels, filters, kernel, height, width, target)
            if boxes
            else configs.pointer_config(dtype, channels, filters, gpu)
        )
        function = kernels._conv_box_kernel if boxes else kernels._conv_pointer_kernel
        given = dict.fromkeys(("source", "history", "weight", "bias", "residual", "y"), pointer)
        extra = kind == "fwd"
        constants = {
            "REPLICATE": history,
            "HAS_HISTORY": history,
            "HAS_BIAS": extra,
            "HAS_RESIDUAL": extra,
            "SILU": extra,
        }
    block = {"BLOCK_N": config.block_n, "BLOCK_C": config.block_c}
    if boxes:
        block |= {"BLOCK_H": config.block_h, "BLOCK_W": config.block_w}
        box = f"1,1,{config.block_h},{config.block_w}"
        given["source"] = given["history"] = f"tensordesc<{element}[{box},{config.block_c}]>"
        given["grad"] = f"tensordesc<{element}[{box},{config.block_n}]>"
        given["weight"] = f"tensordesc<{element}[1,{config.block_n},{config.block_c}]>"
        given["weight2"] = f"tensordesc<{element}[1,{config.block_n2 or config.block_n},{config.block_c}]>"
    else:
        block |= {
            "BLOCK_M": config.block_m,
            "FLAT": config.flat,
            "LONG": False,
            "REPLICATE_SPACE": False,
            "MUL_H": 1,
            "MUL_W": 1,
        }
    if "BLOCK_N2" in function.arg_names:
        block |= {"BLOCK_N2": config.block_n2, "TRANSPOSED": config.transposed, "HALVES": config.halves}
    if "WAIT" in function.arg_names:
        through_registers = config.block_h > 1 and not config.transposed if boxes else history
        block["WAIT"] = target == "sm_90" and through_registers
    constants |= block | _constants(function, kernel, -1 if kind == "dgrad" else 1, dtype, full)
    signature = _types(function, constants, given, channels, filters)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot.compile_kernel(function, signature, constants, target, **options)


def check(found: aot.Report, target: str, name: str, boxes: bool = True) -> None:
    """No spills, shared memory within the device's, matrix instructions, boxes where they are meant, wide accesses."""
    assert found.spills == 0, found
    assert found.shared <= SHARED[target]
    assert found.count(*MATRIX[target]) > 0
    assert (found.count("UTMALDG") > 0) == boxes
    if name.startswith("3-") or name.endswith("-3 3x3x3"):
        return  # three channels are no 16 bytes
    assert found.wide_loads > 0
    if target != "gfx942":
        assert found.wide_stores > 0 and found.count("LDG.E.U16") <= 4  # of the bias, two a sum at most


def boxed(kind: str, name: str, target: str) -> bool:
    few = {"fwd": ("3-128 3x3x3",), "dgrad": ("128-3 3x3x3",), "wgrad": ("3-128 3x3x3", "128-3 3x3x3")}[kind]
    return target in ("sm_90", "sm_100") and name not in few


@pytest.mark.parametrize(
    ("kind", "name", "history"),
    [
        ("fwd", "128 1x3x3", False),
        ("fwd", "256 3x3x3", True),
        ("dgrad", "96 3x3x3", False),
        ("wgrad", "512 3x3x3", False),
    ],
)
def test_hopper_reads_boxes_into_warpgroup_products(kind: str, name: str, history: bool) -> None:
    """wgmma on bulk tensor copies."""
    found = report(kind, name, "sm_90", history=history)
    check(found, "sm_90", name)
    assert found.count("HGMMA") > 0


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PTX of every compilation."""
    import triton

    found: list[str] = []
    original = triton.compile

    def compile_and_keep(*args: Any, **options: Any) -> Any:
        compiled = original(*args, **options)
        found.append(compiled.asm["ptx"])
        return compiled

    monkeypatch.setattr(triton, "compile", compile_and_keep)
    return found


def unfinished(code: str) -> set[int]:
    """How many groups of products are still running behind the code's waits."""
    return {int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code)}


def from_shared(code: str) -> bool:
    """Whether no product reads its first operand from registers."""
    assert "wgmma.mma_async" in code
    return re.search(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{", code) is None


@pytest.mark.parametrize(
    ("name", "sums"), [("192 1x3x3", 2), ("192 3x3x3", 2), ("160 3x3x3", 2), ("256 3x3x3", 1), ("512 3x3x3", 2)]
)
def test_a_step_is_waited_for_before_its_boxes_are_copied_again(name: str, sums: int, codes: list[str]) -> None:
    """All sums of one step may run while the next is copied, none of the step before."""
    check(report("fwd", name, "sm_90", history=True), "sm_90", name)
    assert from_shared(codes[0]) and unfinished(codes[0]) == {0, sums}


@pytest.mark.parametrize(
    ("kind", "name", "history", "boxed"),
    [
        ("fwd", "32 3x3x3", False, True),
        ("fwd", "32 3x3x3", True, True),
        ("fwd", "32 3x3x3", True, False),
        ("wgrad", "512 3x3x3", False, True),
        ("fwd", "128 1x3x3", False, True),
    ],
)
def test_products_of_registers_are_waited_for(
    kind: str, name: str, history: bool, boxed: bool, codes: list[str]
) -> None:
    """A product that reads registers is over before they are loaded again; Triton 3.6 by itself left three unfinished."""
    report(kind, name, "sm_90", history=history, boxed=boxed)
    assert from_shared(codes[0]) == (name == "128 1x3x3")
    assert unfinished(codes[0]) == {0} or from_shared(codes[0])


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_pointers_elsewhere(target: str) -> None:
    check(report("fwd", "128 1x3x3", target), target, "128 1x3x3", boxes=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["fwd", "dgrad", "wgrad"])
def test_every_shape(kind: str, name: str, target: str) -> None:
    """With bias, SiLU, residual, and history with replicated frames; bfloat16, and float32 through TF32."""
    for dtype in (torch.bfloat16, torch.float32):
        for history in (False, True)[: 2 if kind == "fwd" else 1]:
            check(report(kind, name, target, dtype, history), target, name, boxed(kind, name, target))


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("kind", ["fwd", "dgrad", "wgrad"])
def test_float32_without_tf32(kind: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("128 1x3x3", "3-128 3x3x3"):
        found = report(kind, name, target, torch.float32, full=True)
        assert found.spills == 0 and found.shared <= SHARED[target]
        assert found.count("HGMMA", "HMMA", "UTCHMMA") == 0
