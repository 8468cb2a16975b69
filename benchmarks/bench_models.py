# SPDX-License-Identifier: Apache-2.0
"""Whole models of diffusers with random weights, patched against unpatched and compiled."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

import vidkernels
from benchmarks.phases import phase
from benchmarks.random_models import build, compile_blocks, near_reference, own_error
from benchmarks.registry import Case, Inputs, register

Call = Callable[[Any, Inputs], torch.Tensor]

NOTE = "Whole models: random weights, standard normal inputs. torch.compile: encoder and decoder, or each block."
CROP_NOTE = " Compared with eager, whose own error is measured on a small crop."


class _Model:
    """A model, its patched copy and its wide copy, each built when it is first needed and dropped with the case."""

    def __init__(self, name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.config, self.device, self.dtype = name, config, device, dtype

    def _build(self) -> Any:
        import diffusers

        diffusers.logging.set_verbosity_error()
        return build(lambda: getattr(diffusers, self.name)(**self.config), self.device, self.dtype)

    @functools.cached_property
    def plain(self) -> Any:
        return self._build()

    @functools.cached_property
    def patched(self) -> Any:
        model = self._build()  # the same seed, hence the same weights; fake parameters cannot be deep-copied
        with phase("patch"):
            vidkernels.patch(model)
        return model

    @functools.cached_property
    def compiled(self) -> Any:
        """A VAE's encoder and decoder, which `encode` and `decode` call once per chunk of the clip; a transformer's blocks.

        Built here and not by `torch.compile(reference)`: that would trace the building of a model that is not there yet.
        """
        model = self._build()
        if not hasattr(model, "encoder"):
            return compile_blocks(model)
        for part in (model.encoder, model.decoder):
            part.compile(dynamic=False)
        return model

    def case(
        self,
        name: str,
        make_inputs: Callable[[], Inputs],
        call: Call,
        make_crop: Callable[[], Inputs] | None = None,
        compile: bool = True,
        **options: Any,
    ) -> Case:
        """A case of this model; its truth is the same weights in float32 (float64 for float32 models).

        make_crop: makes inputs of a small crop. Then eager is what results are compared with, and its own error that of the
            crop: a float32 Wan decoder takes half a minute of a GPU for 81 frames of 480x832.
        """
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32

        def truth(inputs: Inputs) -> torch.Tensor:
            if make_crop:
                return own_error(self.plain, call, make_crop(), wide)
            model = copy.deepcopy(self.plain).to(wide)
            widened = {k: v.to(wide) if v.is_floating_point() else v for k, v in inputs.items()}
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return call(model, widened)

        return Case(
            name=f"{name} {str(self.dtype).removeprefix('torch.')}",
            make_inputs=make_inputs,
            ours=lambda inputs: call(self.patched, inputs),
            reference=lambda inputs: call(self.plain, inputs),
            truth=truth,
            check=near_reference if make_crop else "allclose",
            compile=(lambda inputs: call(self.compiled, inputs)) if compile else False,
            whole=True,
            note=NOTE + (CROP_NOTE if make_crop else ""),
            **options,
        )


def _encode(model: Any, inputs: Inputs) -> torch.Tensor:
    return model.encode(inputs["video"]).latent_dist.parameters


def _decode(model: Any, inputs: Inputs) -> torch.Tensor:
    decoded = model.decode(inputs["latents"])
    return decoded if isinstance(decoded, torch.Tensor) else decoded.sample


def _tokenizer(
    model: _Model,
    label: str,
    video: tuple[int, int, int, int],
    latents: tuple[int, int, int, int],
    flops: tuple[int | None, int | None] = (None, None),
    compile: tuple[bool, bool] = (False, False),
) -> Iterator[Case]:
    """Encoding and decoding; `flops`, `compile`: of each. On a GPU compared on a crop of 2 latent frames, 8x8 latents."""

    def make(key: str, channels: int, *size: int) -> Callable[[], Inputs]:
        return lambda: {key: torch.randn(1, channels, *size, device=model.device).to(model.dtype)}

    size = "x".join(map(str, video[1:]))
    on_gpu = model.device.type == "cuda"
    space, frames = video[2] // latents[2], 1 + (video[1] - 1) // max(1, latents[1] - 1)
    if label.startswith("AutoencoderVidTok"):  # it takes its 3 frames of padding from the caller
        frames = 2 * video[1] // latents[1]
    crops = make("video", video[0], frames, 8 * space, 8 * space), make("latents", latents[0], 2, 8, 8)
    for i, (task, key, shape, call) in enumerate(
        (("encode", "video", video, _encode), ("decode", "latents", latents, _decode))
    ):
        crop = crops[i] if on_gpu else None
        yield model.case(f"{label} {task} {size}", make(key, *shape), call, crop, flops=flops[i], compile=compile[i])


def _latte(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(
        inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["text"],
        enable_temporal_attentions=True,
    ).sample


def _wan(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], timestep=inputs["timestep"], encoder_hidden_states=inputs["text"]).sample


def _step(
    model: _Model, label: str, latents: tuple[int, ...], text: tuple[int, int], call: Call, compile: bool = True
) -> Case:
    """A denoising step. On a GPU compared on a crop of 16x16 latents a frame."""

    def make_inputs(*size: int) -> Inputs:
        return {
            "latents": torch.randn(size, device=model.device).to(model.dtype),
            "text": torch.randn(size[0], *text, device=model.device).to(model.dtype),
            "timestep": torch.randint(0, 1000, (size[0],), device=model.device),
        }

    crop = functools.partial(make_inputs, *latents[:-2], 16, 16) if model.device.type == "cuda" else None
    name = f"{label} step {'x'.join(map(str, latents))}"
    return model.case(name, functools.partial(make_inputs, *latents), call, crop, compile=compile)


LATTE_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "video_length": 16,
}
WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}


@register(stem="models")
def small_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Narrow models that a CPU runs in a second."""
    if not quick or importlib.util.find_spec("diffusers") is None:
        return
    vidtok = _Model("AutoencoderVidTok", {"ch": 64}, device, torch.float32)
    yield from _tokenizer(vidtok, "AutoencoderVidTok ch=64", (3, 8, 16, 16), (4, 2, 2, 2))
    latte = _Model(
        "LatteTransformer3DModel",
        LATTE_XL | {"num_layers": 2, "sample_size": 16, "video_length": 4},
        device,
        torch.float32,
    )
    yield _step(latte, "Latte-XL/2, 2 of 28 layers,", (1, 4, 4, 16, 16), (20, 4096), _latte, compile=False)


@register(stem="models")
def large_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Full models at the sizes people run, the five rows that say most first: seconds each on an H100."""
    if quick or device.type == "cpu" or importlib.util.find_spec("diffusers") is None:
        return
    dtype = torch.bfloat16
    vidtok = _Model("AutoencoderVidTok", {}, device, dtype)
    flops = (5_856_000_000_000, 14_913_000_000_000)
    yield from _tokenizer(vidtok, "AutoencoderVidTok", (3, 20, 256, 256), (4, 5, 32, 32), flops, compile=(True, True))
    latte = _Model("LatteTransformer3DModel", LATTE_XL, device, dtype)
    yield _step(latte, "Latte-XL/2", (2, 4, 16, 64, 64), (120, 4096), _latte)
    transformer = _Model("WanTransformer3DModel", WAN_1_3B, device, dtype)
    yield _step(transformer, "Wan 1.3B", (1, 16, 21, 60, 104), (512, 4096), _wan)
    # Its feature cache is a Python list that grows: torch.compile breaks the graph at each of its convolutions.
    wan = _Model("AutoencoderKLWan", {}, device, dtype)
    encode, decode = _tokenizer(
        wan, "AutoencoderKLWan", (3, 81, 480, 832), (16, 21, 60, 104), (None, 274_000_000_000_000)
    )
    yield decode
    yield from _tokenizer(wan, "AutoencoderKLWan", (3, 17, 256, 256), (16, 5, 32, 32))
    yield encode


# Name, latent channels, ratio in time and in space.
VIDEO_VAES = (
    ("AutoencoderKLHunyuanVideo", 16, 4, 8),
    ("AutoencoderKLHunyuanVideo15", 32, 4, 16),
    ("AutoencoderKLCogVideoX", 16, 4, 8),
    ("AutoencoderKLLTXVideo", 128, 8, 32),
    ("AutoencoderKLLTX2Video", 128, 8, 32),
    ("AutoencoderKLCosmos", 16, 8, 8),
    ("AutoencoderKLMagvit", 16, 4, 8),
)


@register(stem="models")
def video_vaes(device: torch.device, quick: bool) -> Iterator[Case]:
    """Video VAEs in full width: a clip that a CPU encodes in seconds, or the usual one on a GPU.

    torch.compile only where a Wan VAE decodes on a CPU: caches are lists, dictionaries or attributes that change from chunk
    to chunk, so that graphs end at each convolution or are compiled again.
    """
    if quick or importlib.util.find_spec("diffusers") is None:
        return
    cpu = device.type == "cpu"
    frames, side, dtype = (9, 64, torch.float32) if cpu else (17, 256, torch.bfloat16)
    if cpu:
        wan = _Model("AutoencoderKLWan", {}, device, dtype)
        size = (3, frames, side, side), (16, 1 + frames // 4, side // 8, side // 8)
        yield from _tokenizer(wan, "AutoencoderKLWan", *size, compile=(False, True))
    for name, channels, time, space in VIDEO_VAES:
        model = _Model(name, {}, device, dtype)
        latents = channels, 1 + frames // time, side // space, side // space
        yield from _tokenizer(model, name, (3, frames, side, side), latents)


# Stable Diffusion's, whose frames are those of Latte, Open-Sora and PixArt.
IMAGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@register(stem="models")
def image_vaes(device: torch.device, quick: bool) -> Iterator[Case]:
    """VAEs of frames: a clip of Latte's on a GPU, a frame on a CPU."""
    if quick or importlib.util.find_spec("diffusers") is None:
        return
    cpu = device.type == "cpu"
    count, side, dtype = (1, 256, torch.float32) if cpu else (16, 512, torch.bfloat16)
    model = _Model("AutoencoderKL", IMAGE_VAE, device, dtype)

    def make(key: str, *size: int) -> Callable[[], Inputs]:
        return lambda: {key: torch.randn(size, device=device).to(dtype)}

    for task, key, channels, space, call in (("encode", "video", 3, 1, _encode), ("decode", "latents", 4, 8, _decode)):
        inputs = make(key, count, channels, side // space, side // space)
        crop = None if cpu else make(key, 2, channels, 64 // space, 64 // space)
        yield model.case(f"AutoencoderKL {task} {count}x{side}x{side}", inputs, call, crop)
