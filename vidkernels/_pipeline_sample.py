# SPDX-License-Identifier: Apache-2.0
"""Latents from noise: each kind of transformer with its own sampler, both branches of guidance in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidkernels import packing
from vidkernels._pipeline import Pipeline, Request, completed
from vidkernels.errors import OptionError
from vidkernels.sampling import GaussianDiffusion, RectifiedFlow, guided
from vidkernels.sampling.rectified_flow import open_sora_shift

Model = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int], None]


@torch.inference_mode()
def sample(pipeline: Pipeline, request: Request, progress: Progress | None = None) -> Tensor:
    """Latents [1, C, T, H, W] in the tokenizer's units, float32.

    Args:
        pipeline: transformer and statistics.
        request: see `Request`.
        progress: called with the number of each finished step, from 1.

    Raises:
        OptionError: the request does not fit the model, or the latents are not finite.
    """
    request = completed(request, pipeline)
    generator = torch.Generator().manual_seed(request.seed)
    channels = pipeline.config.model["in_channels"]
    noise = torch.randn(1, channels, *request.size, generator=generator).to(pipeline.device)
    latents = _SAMPLERS[pipeline.config.kind](pipeline, request, noise, progress or (lambda step: None))
    if not latents.isfinite().all():
        found = f"NaN or infinity after {request.steps} steps in {_dtype(pipeline)}"
        raise OptionError("--model", "finite latents", found, "Are the weights whole? Try --dtype float32.")
    mean, std = pipeline.statistics(latents)
    return latents * std + mean


def _dtype(pipeline: Pipeline) -> torch.dtype:
    return next(pipeline.model.parameters()).dtype


def _goku(pipeline: Pipeline, request: Request, noise: Tensor, progress: Progress) -> Tensor:
    """Prompt and null are two samples of one pack."""
    dtype, patch = _dtype(pipeline), tuple(pipeline.config.model["patch_size"])
    branches = 1 if request.guidance == 1 else 2
    template = packing.pack([noise[0]] * branches, patch)
    condition = _goku_condition(pipeline, request, branches)

    def model(x: Tensor, t: Tensor) -> Tensor:
        packed = packing.pack(list(x), patch)
        place = (template.cu_seqlens, template.max_seqlen, template.positions)
        tokens = pipeline.model(packed.tokens.to(dtype), t, *place, **condition).float()
        return torch.stack(packing.unpack(packed, tokens))

    flow = RectifiedFlow("t", shift=request.shift or 1.0, time_scale=1.0)
    return _integrate(flow, model, request, noise, progress)


def _goku_condition(pipeline: Pipeline, request: Request, branches: int) -> dict[str, Any]:
    if request.text is None:
        null = pipeline.config.model["num_classes"]
        if null is None:
            return {}
        return {"labels": torch.tensor([request.label, null][:branches], device=pipeline.device)}
    text = packing.pack_text([state.to(pipeline.device, _dtype(pipeline)) for state in _states(request, branches)])
    return {"text": text.tokens, "text_cu_seqlens": text.cu_seqlens, "text_max_seqlen": text.max_seqlen}


def _states(request: Request, branches: int) -> list[Tensor]:
    """States of the prompt and, for two branches, of the empty prompt; `completed` has seen that they are there."""
    states = [state for state in (request.text, request.null_text)[:branches] if state is not None]
    assert len(states) == branches
    return states


def _integrate(flow: RectifiedFlow, model: Model, request: Request, noise: Tensor, progress: Progress) -> Tensor:
    velocity = model if request.guidance == 1 else guided(model, request.guidance or 1.0)
    return flow.sample(
        velocity, noise, request.steps or 1, method=request.method or "euler", callback=lambda step, x: progress(step)
    )


def _stdit3(pipeline: Pipeline, request: Request, noise: Tensor, progress: Progress) -> Tensor:
    """Open-Sora 1.2: the null caption is the model's own, cut by the prompt's mask."""
    transformer: Any = pipeline.model
    dtype, length = _dtype(pipeline), pipeline.config.model["model_max_length"]
    states = _states(request, 1)[0]
    text = torch.zeros(1, 1, length, states.shape[-1], device=noise.device, dtype=dtype)
    count = min(length, len(states))
    text[0, 0, :count] = states[:count].to(noise.device, dtype)
    mask = (torch.arange(length, device=noise.device) < count)[None].int()
    captions = (
        text if request.guidance == 1 else torch.cat([text, transformer.y_embedder.y_embedding[None, None].to(dtype)])
    )
    told = {"fps": request.fps, "height": request.pixels[0], "width": request.pixels[1]}
    sizes = {name: torch.tensor([float(value)], device=noise.device) for name, value in told.items()}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return transformer(x.to(dtype), t, captions, mask, **sizes)[:, : x.shape[1]].float()

    usual = open_sora_shift(*request.pixels, request.size[0])
    shift = usual if request.shift is None else request.shift
    flow = RectifiedFlow("sigma", predicts="data", shift=shift)
    return _integrate(flow, model, request, noise, progress)


def _diffuse(
    model: Model, request: Request, noise: Tensor, channel_dim: int, learned: bool, progress: Progress
) -> Tensor:
    diffusion = GaussianDiffusion(str(request.steps), learned_range=learned, channel_dim=channel_dim)
    generator = torch.Generator(noise.device).manual_seed(request.seed + 1)
    done = iter(range(1, len(diffusion) + 1))
    return diffusion.sample(
        model,
        noise,
        method=request.method or "ddpm",
        generator=generator,
        callback=lambda step, x: progress(next(done)),
    )


def _guided_noise(model: Model, guidance: float, channels: int, dim: int) -> Model:
    """Guidance of the noise channels; the variance is the prompt's own."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        prompt, null = model(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        prompt, variance = prompt.tensor_split([channels], dim)
        null = null.narrow(dim, 0, channels)
        return torch.cat([null + guidance * (prompt - null), variance], dim)

    return model if guidance == 1 else both


def _latte(pipeline: Pipeline, request: Request, noise: Tensor, progress: Progress) -> Tensor:
    dtype, classes = _dtype(pipeline), pipeline.config.model["num_classes"]
    labels = None if classes is None else torch.tensor([request.label, classes], device=noise.device)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return pipeline.model(x.to(dtype), t, None if labels is None else labels[: len(x)]).float()

    frames_first = noise.transpose(1, 2)  # [1, F, C, H, W]
    velocity = _guided_noise(model, request.guidance or 1.0, noise.shape[1], 2)
    learned = bool(pipeline.config.model["learn_sigma"])
    return _diffuse(velocity, request, frames_first, 2, learned, progress).transpose(1, 2)


def _latte_t2v(pipeline: Pipeline, request: Request, noise: Tensor, progress: Progress) -> Tensor:
    dtype = _dtype(pipeline)
    states = _states(request, 1 if request.guidance == 1 else 2)
    length = max(len(state) for state in states)
    captions = torch.zeros(
        len(states), length, pipeline.config.model["caption_channels"], device=noise.device, dtype=dtype
    )
    mask = torch.zeros(len(states), length, device=noise.device)
    for i, state in enumerate(states):
        captions[i, : len(state)], mask[i, : len(state)] = state.to(noise.device, dtype), 1

    def model(x: Tensor, t: Tensor) -> Tensor:
        return pipeline.model(x.to(dtype), t, captions, mask).float()

    velocity = _guided_noise(model, request.guidance or 1.0, noise.shape[1], 1)
    learned = pipeline.config.model["out_channels"] == 2 * noise.shape[1]
    return _diffuse(velocity, request, noise, 1, learned, progress)


_SAMPLERS: dict[str, Callable[[Pipeline, Request, Tensor, Progress], Tensor]] = {
    "goku": _goku,
    "latte": _latte,
    "latte_t2v": _latte_t2v,
    "stdit3": _stdit3,
}
