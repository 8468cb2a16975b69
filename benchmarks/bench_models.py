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
from benchmarks.random_models import build
from benchmarks.registry import Case, Inputs, register

Call = Callable[[Any, Inputs], torch.Tensor]


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
        vidkernels.patch(model)
        return model

    @functools.cached_property
    def compiled(self) -> Any:
        """Its encoder and decoder compiled: what `encode` and `decode` call once per chunk of the clip."""
        model = self._build()
        for part in (model.encoder, model.decoder):
            part.compile(dynamic=False)
        return model

    def case(self, name: str, make_inputs: Callable[[], Inputs], call: Call, **options: Any) -> Case:
        """A case of this model; its truth is the same weights in float32 (float64 for float32 models)."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32

        def truth(inputs: Inputs) -> torch.Tensor:
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
            note="Whole models: random weights, standard normal inputs.",
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
    video: tuple[int, ...],
    latents: tuple[int, ...],
    flops: tuple[int | None, int | None],
    compile_parts: bool = False,
    **options: Any,
) -> Iterator[Case]:
    """`compile_parts`: decoding also by the model whose networks are compiled."""

    def make(key: str, shape: tuple[int, ...]) -> Callable[[], Inputs]:
        return lambda: {key: torch.randn(1, *shape, device=model.device).to(model.dtype)}

    size = "x".join(map(str, video[1:]))
    yield model.case(f"{label} encode {size}", make("video", video), _encode, flops=flops[0], **options)
    if compile_parts:
        options["compile"] = lambda inputs: _decode(model.compiled, inputs)
    yield model.case(f"{label} decode {size}", make("latents", latents), _decode, flops=flops[1], **options)


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
    model: _Model, label: str, latents: tuple[int, ...], text: tuple[int, int], call: Call, **options: Any
) -> Case:
    def make_inputs() -> Inputs:
        return {
            "latents": torch.randn(latents, device=model.device).to(model.dtype),
            "text": torch.randn(latents[0], *text, device=model.device).to(model.dtype),
            "timestep": torch.randint(0, 1000, (latents[0],), device=model.device),
        }

    return model.case(f"{label} step {'x'.join(map(str, latents))}", make_inputs, call, **options)


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
    yield from _tokenizer(vidtok, "AutoencoderVidTok ch=64", (3, 8, 16, 16), (4, 2, 2, 2), (None, None), compile=False)
    latte = _Model(
        "LatteTransformer3DModel",
        LATTE_XL | {"num_layers": 2, "sample_size": 16, "video_length": 4},
        device,
        torch.float32,
    )
    yield _step(latte, "Latte-XL/2, 2 of 28 layers,", (1, 4, 4, 16, 16), (20, 4096), _latte, compile=False)


@register(stem="models")
def large_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Full models at the sizes people run."""
    if quick or device.type == "cpu" or importlib.util.find_spec("diffusers") is None:
        return
    vidtok = _Model("AutoencoderVidTok", {}, device, torch.bfloat16)
    flops = (5_856_000_000_000, 14_913_000_000_000)
    yield from _tokenizer(vidtok, "AutoencoderVidTok", (3, 20, 256, 256), (4, 5, 32, 32), flops)
    yield _step(
        _Model("LatteTransformer3DModel", LATTE_XL, device, torch.bfloat16),
        "Latte-XL/2",
        (2, 4, 16, 64, 64),
        (120, 4096),
        _latte,
    )
    wan = _Model("AutoencoderKLWan", {}, device, torch.bfloat16)
    # Its feature cache is a Python list that grows: torch.compile breaks the graph at each of its convolutions.
    yield from _tokenizer(wan, "AutoencoderKLWan", (3, 17, 256, 256), (16, 5, 32, 32), (None, None), compile=False)
    flops_81 = (None, 274_000_000_000_000)
    yield from _tokenizer(wan, "AutoencoderKLWan", (3, 81, 480, 832), (16, 21, 60, 104), flops_81, compile=False)
    transformer = _Model("WanTransformer3DModel", WAN_1_3B, device, torch.bfloat16)
    yield _step(transformer, "Wan 1.3B", (1, 16, 21, 60, 104), (512, 4096), _wan)


# Name, latent channels, ratio in time and in space.
VIDEO_VAES = (
    ("AutoencoderKLHunyuanVideo", 16, 4, 8),
    ("AutoencoderKLHunyuanVideo15", 32, 4, 16),
    ("AutoencoderKLCogVideoX", 16, 4, 8),
    ("AutoencoderKLLTXVideo", 128, 8, 32),
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
        yield from _tokenizer(wan, "AutoencoderKLWan", *size, (None, None), compile_parts=True, compile=False)
    for name, channels, time, space in VIDEO_VAES:
        model = _Model(name, {}, device, dtype)
        latents = channels, 1 + frames // time, side // space, side // space
        yield from _tokenizer(model, name, (3, frames, side, side), latents, (None, None), compile=False)
