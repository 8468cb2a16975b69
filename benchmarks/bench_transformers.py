# SPDX-License-Identifier: Apache-2.0
"""Denoising steps of this package's Latte-XL/2 and STDiT3-XL/2 against the way their published code computes them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.official import OfficialLatte, OfficialSTDiT3, stdit3_positions
from benchmarks.random_models import build
from benchmarks.registry import Case, Inputs, register
from vidkernels._conv.aten import native_on_cpu
from vidkernels.caching import adacache
from vidkernels.models.transformers import Latte, LatteConfig, STDiT3, STDiT3Config

NOTE = (
    "Random weights. eager and torch.compile: the published code's operations (benchmarks/official.py), same weights."
)
Official = Callable[[Any, Inputs], Tensor]


class _Step:
    """One denoising step: the model, built when it is first needed, and both ways to compute it."""

    def __init__(self, make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        self.make, self.device, self.dtype = make, device, dtype

    @functools.cached_property
    def model(self) -> Any:
        model = build(self.make, self.device, self.dtype)
        if isinstance(model, Latte) and not isinstance(next(model.parameters()), FakeTensor):
            model.batch_modulation()
        return model

    def case(
        self,
        name: str,
        make_inputs: Callable[[], Inputs],
        ours: Callable[[Any, Inputs], Tensor],
        official: Official,
        peers: dict[str, Official] | None = None,
        **options: Any,
    ) -> Case:
        """The truth is the published computation in float32 (float64 for float32 models)."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32

        def truth(inputs: Inputs) -> Tensor:
            widened = {
                k: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
            }
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return official(copy.deepcopy(self.model).to(wide), widened)

        options = {"truth": truth, "note": NOTE, **options}
        return Case(
            name=f"{name} {str(self.dtype).removeprefix('torch.')}",
            make_inputs=make_inputs,
            ours=lambda inputs: ours(self.model, inputs),
            reference=lambda inputs: official(self.model, inputs),
            peers={key: (lambda inputs, f=f: f(self.model, inputs)) for key, f in (peers or {}).items()},
            **options,
        )


def _latte(
    label: str,
    side: int,
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    fused: bool = True,
    **options: Any,
) -> Case:
    """Latte-XL/2 over 16 frames of side x side latents, conditioned on a class. fused: also against torch's attention."""
    config = replace(LatteConfig.named("Latte-XL/2"), num_classes=101, input_size=side, depth=depth)

    def make_inputs() -> Inputs:
        return {
            "x": torch.randn(batch, 16, 4, side, side, device=device).to(dtype),
            "t": torch.randint(0, 1000, (batch,), device=device),
            "y": torch.randint(0, 101, (batch,), device=device),
        }

    def official(model: Any, inputs: Inputs, fused: bool = False) -> Tensor:
        return OfficialLatte(model, fused)(inputs["x"], inputs["t"], inputs["y"])

    return _Step(lambda: Latte(config), device, dtype).case(
        f"{label} step {batch}x16x4x{side}x{side}",
        make_inputs,
        lambda model, inputs: model(inputs["x"], inputs["t"], inputs["y"]),
        official,
        {"eager, torch's attention": functools.partial(official, fused=True)} if fused else {},
        **options,
    )


def _stdit3(
    label: str,
    pixels: tuple[int, int],
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    frames: int = 15,
    clean: int = 0,
    **options: Any,
) -> Case:
    """STDiT3-XL/2 on captions of 300 tokens. clean: frames held as a condition, through `x_mask`."""
    config = STDiT3Config(depth=depth)
    # 8 pixels a latent, patches of 2; odd latents would be padded
    height, width = (side // 16 * 2 for side in pixels)
    table = stdit3_positions((height // 2, width // 2), pixels, config.hidden_size)

    def make_inputs() -> Inputs:
        inputs: Inputs = {
            "x": torch.randn(batch, 4, frames, height, width, device=device).to(dtype),
            # A model in bfloat16 rounds it, as the official code does: the truth in float32 is given the same step.
            "t": (torch.rand(batch, device=device) * 1000).to(dtype).float(),
            "y": torch.randn(batch, 1, 300, 4096, device=device).to(dtype),
            "fps": torch.full((1,), 24.0, device=device),
            "height": torch.full((1,), float(pixels[0]), device=device),
            "width": torch.full((1,), float(pixels[1]), device=device),
            "positions": table.to(device, dtype),
        }
        if clean:
            inputs["x_mask"] = (torch.arange(frames, device=device) >= clean).expand(batch, frames)
        return inputs

    def ours(model: Any, inputs: Inputs) -> Tensor:
        sizes = {name: inputs[name] for name in ("fps", "height", "width")}
        return model(inputs["x"], inputs["t"], inputs["y"], x_mask=inputs.get("x_mask"), **sizes)

    def official(model: Any, inputs: Inputs) -> Tensor:
        return OfficialSTDiT3(model)(
            inputs["x"], inputs["t"], inputs["y"], inputs["fps"], inputs["positions"], inputs.get("x_mask")
        )

    condition = f", {clean} of {frames} frames clean," if clean else ""
    name = f"{label}{condition} step {batch}x4x{frames}x{height}x{width}"
    return _Step(lambda: STDiT3(config), device, dtype).case(name, make_inputs, ours, official, **options)


STEPS = 30
# Whatever the distance: 10 of 30 steps are computed, and measured as with any codebook.
EVERY_FOURTH = ((1e9, 4), (2e9, 4))


def _adacache(
    label: str, config: LatteConfig, side: int, device: torch.device, dtype: torch.dtype, batch: int = 1
) -> Case:
    """All steps of a sample with a step cache against all of them computed; the last step is computed by both."""
    config = replace(config, num_classes=101, input_size=side)

    def make_inputs() -> Inputs:
        x = torch.randn(batch, 16, 4, side, side, device=device).to(dtype)
        times = [torch.full((batch,), 999.0 - 33 * step, device=device) for step in range(STEPS)]
        return {"x": x, "y": torch.tensor([3, 101], device=device)[:batch], "times": times}

    def every(model: Any, inputs: Inputs, steps: int = STEPS) -> Tensor:
        return [model(inputs["x"], t, inputs["y"]) for t in inputs["times"][-steps:]][-1]

    def cached(model: Any, inputs: Inputs) -> Tensor:
        with adacache(model, STEPS, codebook=EVERY_FOURTH) as handle:
            output = every(model, inputs)
            assert len(handle.report().computed_steps) == STEPS // 3
        return output

    step = _Step(lambda: Latte(config), device, dtype)
    note = "Random weights. AdaCache with a codebook that computes 10 of 30 steps: 3.00x is what it can give at most."
    return step.case(
        f"{label} AdaCache, 10 of {STEPS} steps, {batch}x16x4x{side}x{side}",
        make_inputs,
        cached,
        every,
        truth=lambda inputs: every(step.model, {**inputs, "x": inputs["x"].to(dtype)}, 1),
        check="exact",
        compile=False,
        note=note,
    )


@register(stem="transformers")
def small_steps(device: torch.device, quick: bool) -> Iterator[Case]:
    """One pair of blocks: a fraction of a second on a CPU."""
    if quick:
        yield _latte("Latte-XL/2, 2 of 28 blocks,", 8, 2, device, torch.float32, compile=False)
        yield _stdit3(
            "STDiT3-XL/2, 1 of 28 pairs", (64, 96), 1, device, torch.float32, frames=5, clean=1, compile=False
        )


@register(stem="transformers")
def cpu_steps(device: torch.device, quick: bool) -> Iterator[Case]:
    """On a CPU: sizes people run with fewer blocks (all are alike), and all blocks at a small size."""
    if quick or device.type != "cpu":
        return
    yield _latte("Latte-XL/2 256x256, 2 of 28 blocks,", 32, 2, device, torch.float32)
    if native_on_cpu(torch.bfloat16):
        yield _latte("Latte-XL/2 256x256, 2 of 28 blocks,", 32, 2, device, torch.bfloat16, compile=False)
        yield _stdit3("STDiT3-XL/2 144p, 1 of 28 pairs,", (144, 256), 1, device, torch.bfloat16, compile=False)
    yield _latte("Latte-XL/2, all blocks, 64x64,", 8, 28, device, torch.float32, fused=False, compile=False)
    yield _stdit3("STDiT3-XL/2 144p, 1 of 28 pairs,", (144, 256), 1, device, torch.float32)
    yield _stdit3("STDiT3-XL/2 144p, 1 of 28 pairs", (144, 256), 1, device, torch.float32, clean=1, compile=False)
    for pixels in (64, 128):  # about 80 and 350 ms a step
        yield _adacache(
            f"Latte-S/2 {pixels}x{pixels}", LatteConfig.named("Latte-S/2"), pixels // 8, device, torch.float32
        )


@register(stem="transformers")
def gpu_steps(device: torch.device, quick: bool) -> Iterator[Case]:
    """Both branches of guidance in one batch, the sizes of the papers."""
    if quick or device.type == "cpu":
        return
    yield _latte("Latte-XL/2 256x256", 32, 28, device, torch.bfloat16, batch=2)
    yield _stdit3("STDiT3-XL/2 480p", (480, 854), 28, device, torch.bfloat16, batch=2)
    yield _stdit3("STDiT3-XL/2 480p", (480, 854), 28, device, torch.bfloat16, batch=2, clean=1, compile=False)
    yield _adacache("Latte-XL/2 256x256", LatteConfig.named("Latte-XL/2"), 32, device, torch.bfloat16, batch=2)
