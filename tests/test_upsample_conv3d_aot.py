# SPDX-License-Identifier: Apache-2.0
"""Machine code of the kernels of upsampling convolutions at the tiles that the models' shapes choose: no spills, the matrix
instructions and box copies of an ordinary convolution, stores of 16 bytes."""

from __future__ import annotations

from typing import Any

import aot
import pytest
import torch

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# channels, filters, the phases' kernel, rows, columns
SHAPES: dict[str, tuple[int, int, tuple[int, int, int], int, int]] = {
    "VidTok in time": (512, 512, (3, 3, 3), 32, 32),
    "VidTok in time, 256 channels": (256, 256, (3, 3, 3), 128, 128),
    "VidTok in space": (512, 512, (1, 2, 2), 64, 64),
    "Wan in space": (384, 192, (1, 2, 2), 60, 104),
    "Wan in space, 192 channels": (192, 96, (1, 2, 2), 240, 416),
    "128 channels": (128, 128, (2, 2, 2), 128, 128),
}


def boxes(name: str, target: str, dtype: torch.dtype = torch.bfloat16, history: bool = False) -> aot.Report:
    """`phase_box_kernel` as a launch for the shape specialises it, with bias."""
    from vidkernels.triton import _conv_phase_kernels as kernels
    from vidkernels.triton._conv_configs import box_config

    channels, filters, kernel, height, width = SHAPES[name]
    config = box_config(dtype, channels, filters, kernel, height, width, target)
    element, box = NAMES[dtype], f"1,1,{config.block_h},{config.block_w}"
    signature = dict.fromkeys(kernels.phase_box_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("source", "history"), f"tensordesc<{element}[{box},{config.block_c}]>")
    signature["weight"] = f"tensordesc<{element}[1,{config.block_n},{config.block_c}]>"
    signature["weight2"] = f"tensordesc<{element}[1,{config.block_n2 or config.block_n},{config.block_c}]>"
    signature |= {"bias": f"*{element}:16", "y": f"*{element}:16", "table": "*i32:16", "filters": "i32:16"}
    constants: dict[str, Any] = {
        "REPLICATE": history, "HAS_HISTORY": history, "HAS_BIAS": True,
        "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_N": config.block_n, "BLOCK_N2": config.block_n2,
        "BLOCK_C": config.block_c, "TRANSPOSED": config.transposed, "HALVES": config.halves, "UPCAST": False,
        "PRECISION": "tf32", "WAIT": target == "sm_90" and config.block_h > 1 and not config.transposed,
    }  # fmt: skip
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot.compile_kernel(kernels.phase_box_kernel, signature, constants, target, **options)


def weights(
    target: str, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False, blend: bool = False, **more: Any
) -> aot.Report:
    """`phase_weights_kernel` of a 3x3x3 kernel."""
    from vidkernels.triton import _conv_phase_kernels as kernels

    pointer = f"*{NAMES[dtype]}:16"
    signature = dict.fromkeys(("weight", "bias", "out"), pointer) | {"mix_factor": "*fp32:16", "table": "*i32:16"}
    signature |= dict.fromkeys(("filters", "outs_t", "outs_h", "outs_w"), "i32") | {"channels": "i32:16"}
    constants = {
        "KT": 3, "KH": 3, "KW": 3, "SPACE": True, "BLEND": blend, "HAS_BIAS": blend, "FRAME": 2 if blend else -1,
        "CENTER": 4 if blend else -1, "CHANNELS_LAST": channels_last, "STACKED": True, "UPCAST": False, "BLOCK": 64,
    }  # fmt: skip
    return aot.compile_kernel(kernels.phase_weights_kernel, signature, constants | more, target, num_warps=2)


def check_boxes(found: aot.Report) -> None:
    assert found.spills == 0, found
    assert found.shared <= 227 << 10
    assert found.count("HGMMA", "UTC", "HMMA") > 0 and found.count("UTMALDG") > 0
    assert found.wide_stores > 0 and found.count("LDG.E.U16") <= 4  # of the bias, two a sum at most


@pytest.mark.parametrize("name", ["VidTok in time", "VidTok in space", "Wan in space"])
def test_all_phases_in_one_launch(name: str) -> None:
    found = boxes(name, "sm_90")
    check_boxes(found)
    assert found.count("HGMMA") > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str, target: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for history in (False, True):
            check_boxes(boxes(name, target, dtype, history))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "channels-last"])
def test_weights_stay_in_registers(channels_last: bool) -> None:
    """27 taps are loaded once each, however many phases follow."""
    found = weights("sm_90", channels_last=channels_last, blend=True)
    assert found.spills == 0 and found.shared == 0 and found.registers <= 96
    assert found.count("LDG.E.U16", "LDG.E.32", "LDG.E.64", "LDG.E.128") <= 27 * (1 if not channels_last else 2) + 3


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("blend", [False, True], ids=["plain", "blend"])
def test_weights_everywhere(blend: bool, target: str) -> None:
    for dtype in NAMES:
        for space in (False, True):
            assert weights(target, dtype, blend=blend, SPACE=space).spills == 0
