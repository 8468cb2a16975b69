# SPDX-License-Identifier: Apache-2.0
"""VidTok with one set of weights: of this package, of diffusers (eager, compiled, patched), and computed the official way."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vidkernels
from benchmarks.random_models import build, near_reference, own_error
from benchmarks.registry import Case, Inputs, register
from vidkernels._conv.aten import native_on_cpu
from vidkernels.models.tokenizers import VidTok, VidTokConfig

Call = Callable[[Any, Inputs], Any]
Size = tuple[int, int, int]

NOTE = (
    "VidTok: random weights, standard normal inputs. vidkernels: models.VidTok. eager, torch.compile (encoder and decoder,"
    " static shapes), diffusers patched: diffusers' AutoencoderVidTok with the same weights. Compared with eager, whose own"
    " error is measured on a small crop."
)
OFFICIAL_NOTE = (
    "VidTok v1.0: random weights. eager: the official way of computing on diffusers' layers: padded copies, upsampled tensors"
    " that are then convolved, and the entropy term over the whole codebook, which the official code evaluates in eval too."
)
CROP: Size = (5, 32, 32)


class _Weights:
    """One set of random weights in every model that computes with it, each built when it is first needed.

    Args:
        name: this package's configuration. width: channels in place of its own.
        options: of diffusers' AutoencoderVidTok.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        width: int = 128,
        options: dict[str, Any] | None = None,
    ) -> None:
        values = VidTokConfig.named(name).to_dict() | {"channels": width}
        self.config = VidTokConfig.from_dict(values)
        self.options = {"ch": width, **(options or {})}
        self.device, self.dtype = device, dtype
        self.own_errors: dict[str, Tensor] = {}

    def _build(self) -> Any:
        diffusers: Any = importlib.import_module("diffusers")
        diffusers.logging.set_verbosity_error()
        return diffusers.AutoencoderVidTok(**self.options).eval().requires_grad_(False)

    def _with_weights(self, model: Any) -> Any:
        model.load_state_dict(self.plain.state_dict(), assign=True)
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def plain(self) -> Any:
        return build(self._build, self.device, self.dtype)

    @functools.cached_property
    def patched(self) -> Any:
        with torch.device("meta"):
            model = self._build()
        model = self._with_weights(model)
        vidkernels.patch(model)
        return model

    @functools.cached_property
    def compiled(self) -> Any:
        with torch.device("meta"):
            model = self._build()
        model = self._with_weights(model)
        for part in (model.encoder, model.decoder):
            part.compile(dynamic=False)
        return model

    @functools.cached_property
    def ours(self) -> VidTok:
        with torch.device("meta"):
            model = VidTok(self.config)
        return self._with_weights(model)

    def own_error(self, task: str, call: Call) -> Tensor:
        """Largest error of eager against float64 (float32 for half precision) on a crop, over the result's largest value."""
        if task not in self.own_errors:
            wide = torch.float64 if self.dtype == torch.float32 else torch.float32
            inputs = self.inputs(CROP if self.device.type == "cuda" or native_on_cpu(self.dtype) else (5, 16, 16))
            self.own_errors[task] = own_error(self.plain, call, inputs, wide)
        return self.own_errors[task]

    def inputs(self, size: Size) -> Inputs:
        """A clip, and latents of the shape of its own."""
        frames, height, width = size
        time, space = self.config.temporal_factor, self.config.spatial_factor
        latents = (self.config.z_channels, 1 + (frames - 1) // time, height // space, width // space)
        shapes = {"video": (3, *size), "latents": latents}
        return {key: torch.randn(1, *shape, device=self.device).to(self.dtype) for key, shape in shapes.items()}

    def case(self, task: str, label: str, size: Size, ours: Call, theirs: Call, **options: Any) -> Case:
        """A row: `ours` on this package's model, `theirs` on diffusers', plain, compiled and patched."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Case(
            name=f"{label} {task} {'x'.join(map(str, size))} {dtype}",
            make_inputs=lambda: self.inputs(size),
            ours=lambda inputs: ours(self.ours, inputs),
            reference=lambda inputs: theirs(self.plain, inputs),
            truth=lambda inputs: self.own_error(task, theirs),
            check=near_reference,
            **options,
        )

    def against_diffusers(self, task: str, label: str, size: Size, compiled: bool, **options: Any) -> Case:
        """A task of `TASKS` with all contestants."""
        ours, theirs = TASKS[task]
        return self.case(
            task,
            label,
            size,
            ours,
            theirs,
            peers={"ours, diffusers patched": lambda inputs: theirs(self.patched, inputs)},
            compile=(lambda inputs: theirs(self.compiled, inputs)) if compiled else False,
            note=NOTE,
            **options,
        )


def _in_front(video: Tensor) -> Tensor:
    """3 copies of the first frame in front, which diffusers leaves to the caller of `encode` and the others do themselves."""
    return torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)


# What each model computes: of this package, of diffusers.
TASKS: dict[str, tuple[Call, Call]] = {
    "encode": (
        lambda model, inputs: model.moments(inputs["video"]),
        lambda model, inputs: model.encode(_in_front(inputs["video"])).latent_dist.parameters,
    ),
    "decode": (
        lambda model, inputs: model.decode(inputs["latents"], num_frames=inputs["video"].shape[2]),
        lambda model, inputs: model.decode(inputs["latents"]),
    ),
    "round trip": (
        lambda model, inputs: model(inputs["video"], sample=False).reconstruction,
        lambda model, inputs: model(inputs["video"], sample_posterior=False).sample,
    ),
}
KL = "vidtok_kl_causal_488_4chn_v1_1"


@register(stem="tokenizers")
def diffusers_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The KL model with 4x8x8 pixels a latent, in float32 and bfloat16."""
    if importlib.util.find_spec("diffusers") is None:
        return
    if quick:
        for dtype in (torch.float32, torch.bfloat16):
            narrow = _Weights(KL, device, dtype, width=32)
            for task in TASKS:
                yield narrow.against_diffusers(task, "VidTok KL, 32 channels,", CROP, compiled=False)
        return
    if device.type == "cuda":
        weights = _Weights(KL, device, torch.bfloat16)
        flops = {"encode": 5_856_000_000_000, "decode": 14_913_000_000_000, "round trip": 20_769_000_000_000}
        for task in TASKS:
            yield weights.against_diffusers(task, "VidTok KL", (17, 256, 256), compiled=True, flops=flops[task])
        return
    for dtype in (torch.float32, torch.bfloat16):
        weights = _Weights(KL, device, dtype)
        if not native_on_cpu(dtype):  # eager needs 41 s for 5x16x16 there, and hours for a clip of 17x128x128
            yield weights.against_diffusers("round trip", "VidTok KL", (5, 16, 16), compiled=False)
            continue
        # Compiling takes a minute a shape: once for each network.
        for task in ("encode", "decode"):
            yield weights.against_diffusers(task, "VidTok KL", (17, 128, 128), compiled=True)
        # Both in one call, and a crop where matrices are small: the least that bfloat16 gains. Compiled, 17x128x128 in
        # bfloat16 takes most of ten minutes; a quarter of the pixels says as much.
        for size in ((17, 64, 64), (17, 32, 32)):
            yield weights.against_diffusers("round trip", "VidTok KL", size, compiled=size[1] == 64)


def _zero_padded(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution of v1.0: a padded copy with zero frames in front, then torch's convolution."""
    space = conv.spatial_padding[:4] if x.ndim == 5 else ()
    return conv.conv(F.pad(x, (*space, conv.time_pad, 0)))


def _pooled(down: Any, x: Tensor) -> Tensor:
    """v1.0's temporal halving: a zero frame in front, the mean of 3 frames blended with the convolution."""
    alpha = torch.sigmoid(down.mix_factor)
    return alpha * down.avg_pool(F.pad(x, (0, 0, 0, 0, 1, 0))) + (1 - alpha) * down.conv(x)


def as_version_1_0(model: Any) -> Any:
    """Make diffusers' causal AutoencoderVidTok, which computes v1.1, compute v1.0: zero frames, repeated frames."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith("VidTokCausalConv"):
            module.forward = functools.partial(_zero_padded, module)
        elif kind == "VidTokDownsample3D":
            module.forward = functools.partial(_pooled, module)
        elif kind == "VidTokUpsample3D":
            module.enable_cached, module.interpolation_mode = False, "nearest"
    return model


def entropy_term(z: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """The auxiliary loss as the official code computes it: a softmax of every token over the whole codebook, in float32."""
    rows = z.float().movedim(1, -1).flatten(0, -2)
    p = (200 * rows @ codebook.float().T).softmax(-1)
    mean = p.mean(0)
    per_token = -(p * p.clamp(min=1e-5).log()).sum(-1).mean()
    of_mean = -(mean * mean.clamp(min=1e-5).log()).sum()
    return 0.1 * (per_token - of_mean) + 0.25 * (z.float() - codes.float()).square().mean()


def _official_encode(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    z = model._encode(_in_front(inputs["video"]))
    codes, indices = model.regularization(z)
    entropy_term(z, codes, model.regularization.implicit_codebook)
    return z, indices


def _encode_tokens(model: VidTok, inputs: Inputs) -> tuple[Tensor, Tensor]:
    moments = model.moments(inputs["video"])
    return moments, model.regularize(moments)[1]["indices"]


class _Official(_Weights):
    """v1.0; `plain` computes it the official way."""

    def _build(self) -> Any:
        return as_version_1_0(super()._build())


@register(stem="tokenizers")
def official_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """An FSQ model of v1.0 against the official way of computing it."""
    if importlib.util.find_spec("diffusers") is None:
        return
    size, width, dtype, bits = (17, 32, 32), 128, torch.float32, 18
    if quick:
        size, width, bits = CROP, 32, 12
    elif device.type == "cuda":
        size, dtype = (17, 128, 128), torch.bfloat16
    codes = 2**bits
    options = {"regularizer": "fsq", "z_channels": bits // 3, "double_z": False, "codebook_size": codes}
    weights = _Official(f"vidtok_fsq_causal_488_{codes}", device, dtype, width, options)
    label = f"VidTok v1.0 FSQ {codes}"
    yield weights.case("encode", label, size, _encode_tokens, _official_encode, compile=False, note=OFFICIAL_NOTE)
    yield weights.case("decode", label, size, *TASKS["decode"], compile=False, note=OFFICIAL_NOTE)
