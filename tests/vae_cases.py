# SPDX-License-Identifier: Apache-2.0
"""diffusers' video VAEs, small, and how a patched one is compared with the original and with float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import assert_within_promise
from torch import nn

import vidkernels


@dataclass(frozen=True)
class Vae:
    """One upstream model: class, small configuration, clip lengths that it takes, and its least height and width.

    parts: names of modules inside that get a hook, of each kind that is fused.
    slicing: whether upstream's slices of a batch work: LTX gives them wrong timesteps, EasyAnimate each other's caches.
    batch: largest batch that upstream takes: HunyuanVideo 1.5 has a mask that does not broadcast.
    tiling: options of `enable_tiling` for tiles of the least size and half of it as overlap; by default the attributes
        that most models have for them are set.
    adapter: name of a convolution of torch's own inside the decoder, for LoRA; peft knows no other.
    """

    model: str
    config: dict[str, Any]
    frames: tuple[int, ...] = (1, 5, 9)
    side: int = 32
    parts: tuple[str, ...] = ()
    adapter: str = ""
    slicing: bool = True
    batch: int = 2
    tiling: dict[str, Any] = field(default_factory=dict)
    channels: int = 3


_LTX = {
    "latent_channels": 8, "block_out_channels": (16, 32, 32), "layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False), "decoder_block_out_channels": (16, 32, 32),
    "decoder_layers_per_block": (1, 1, 1, 1), "decoder_spatio_temporal_scaling": (True, True, False),
    "decoder_inject_noise": (False, False, False, False), "upsample_residual": (False, False, False),
    "upsample_factor": (1, 1, 1),
}  # fmt: skip
VAES: dict[str, Vae] = {
    "wan2.1": Vae(
        "AutoencoderKLWan",
        {"base_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_dim": 4},
        frames=(1, 5, 13, 7),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.1.resnets.0.conv1", "decoder.up_blocks.0.upsamplers.0",
               "encoder.down_blocks.3", "decoder.mid_block.attentions.0", "decoder.norm_out", "decoder"),
        adapter="mid_block.attentions.0.proj",
    ),
    "wan2.2": Vae(
        "AutoencoderKLWan",
        {"base_dim": 16, "decoder_base_dim": 24, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_dim": 4,
         "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
        frames=(1, 5, 9),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.1.resnets.0.conv1", "decoder.up_blocks.0.upsampler"),
        adapter="up_blocks.0.upsampler.resample.1",
    ),
    "qwenimage": Vae(
        "AutoencoderKLQwenImage",
        {"base_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_dim": 4},
        frames=(1, 5, 9),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.mid_block.attentions.0", "encoder.down_blocks.3"),
        adapter="mid_block.attentions.0.proj",
    ),
    "hunyuan": Vae(
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        frames=(1, 5, 9, 6),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.0.upsamplers.0", "decoder.mid_block.attentions.0",
               "decoder.up_blocks.2.resnets.0.conv_shortcut.conv", "decoder.conv_norm_out"),
        adapter="up_blocks.1.resnets.0.conv1.conv",
    ),
    "cogvideox": Vae(
        "AutoencoderKLCogVideoX",
        {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        frames=(1, 9, 8, 17),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.0.upsamplers.0", "decoder.up_blocks.2.resnets.0.norm1",
               "decoder.up_blocks.2.resnets.0.conv1", "encoder.down_blocks.0.downsamplers.0", "decoder.norm_out.conv_y"),
        adapter="up_blocks.0.upsamplers.0.conv",
        tiling={"tile_sample_min_height": 32, "tile_sample_min_width": 32, "tile_overlap_factor_height": 0.5,
                "tile_overlap_factor_width": 0.5},
    ),
    "ltx": Vae(
        "AutoencoderKLLTXVideo",
        {**_LTX, "down_block_types": ("LTXVideoDownBlock3D",) * 3},
        frames=(1, 9, 17),
        parts=("decoder.up_blocks.0.resnets.0", "decoder.up_blocks.1.upsamplers.0", "decoder.mid_block.resnets.0.norm1",
               "encoder.down_blocks.0.conv_out"),
        adapter="up_blocks.0.resnets.0.conv1.conv",
    ),
    "ltx0.9.5": Vae(
        "AutoencoderKLLTXVideo",
        {**_LTX, "block_out_channels": (16, 32, 32, 32), "down_block_types": ("LTXVideo095DownBlock3D",) * 3,
         "downsample_type": ("spatial", "temporal", "spatiotemporal"), "spatio_temporal_scaling": (True, True, True),
         "layers_per_block": (1, 1, 1, 1), "decoder_inject_noise": (True, True, False, False),
         "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2), "timestep_conditioning": True,
         "decoder_spatio_temporal_scaling": (True, True, True), "decoder_block_out_channels": (16, 32, 64)},
        frames=(1, 9),
        side=64,
        slicing=False,
        parts=("decoder.up_blocks.0.resnets.0", "encoder.down_blocks.2.downsamplers.0"),
    ),
    "ltx2": Vae(
        "AutoencoderKLLTX2Video",
        {"latent_channels": 8, "block_out_channels": (16, 32, 32), "down_block_types": ("LTX2VideoDownBlock3D",) * 3,
         "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1, 1, 1, 1),
         "decoder_layers_per_block": (1, 1, 1, 1), "spatio_temporal_scaling": (True, True, True),
         "downsample_type": ("spatial", "temporal", "spatiotemporal"), "decoder_inject_noise": (True, False, True, False)},
        frames=(1, 9),
        side=64,
        parts=("decoder.up_blocks.0.resnets.0", "decoder.up_blocks.1.upsamplers.0", "encoder.down_blocks.2.downsamplers.0",
               "decoder.mid_block.resnets.0.norm1", "encoder.conv_out"),
        adapter="up_blocks.0.resnets.0.conv1.conv",
    ),
    "cosmos": Vae(
        "AutoencoderKLCosmos",
        {"latent_channels": 4, "encoder_block_out_channels": (16, 32, 32, 32), "decode_block_out_channels": (16, 32, 32, 32),
         "attention_resolutions": (8,), "resolution": 32, "num_layers": 1, "patch_size": 2},
        frames=(1, 9, 17),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.1.upsamplers.0", "decoder.mid_block.attentions.0",
               "decoder.mid_block.temp_attentions.0.to_q", "encoder.down_blocks.0.downsamplers.0.conv1", "decoder.norm_out"),
    ),
    "magvit": Vae(
        "AutoencoderKLMagvit",
        {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4},
        frames=(1, 9, 5),
        parts=("decoder.up_blocks.1.convs.0", "decoder.up_blocks.1.upsampler", "decoder.up_blocks.1.upsampler.conv",
               "encoder.down_blocks.1.downsampler", "encoder.conv_norm_out"),
        adapter="up_blocks.2.convs.0.shortcut",
        slicing=False,
    ),
    "magvit-clip-norm": Vae(
        "AutoencoderKLMagvit",
        {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4,
         "spatial_group_norm": False},
        frames=(1, 9),
        slicing=False,
    ),
    "hunyuan1.5": Vae(
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32), "layers_per_block": 1,
         "spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
        frames=(1, 9, 5),
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.0.upsamplers.0", "decoder.up_blocks.2.upsamplers.0",
               "decoder.mid_block.attentions.0", "encoder.down_blocks.1.downsamplers.0", "decoder.norm_out"),
        adapter="mid_block.attentions.0.to_q",
        batch=1,
        tiling={"tile_sample_min_height": 32, "tile_sample_min_width": 32, "tile_latent_min_height": 4,
                "tile_latent_min_width": 4, "tile_overlap_factor": 0.5},
    ),
    "mochi": Vae(
        "AutoencoderKLMochi",
        {"latent_channels": 4, "encoder_block_out_channels": (32, 32, 64, 64), "decoder_block_out_channels": (32, 32, 64, 64),
         "layers_per_block": (1, 1, 1, 1, 1)},
        frames=(1, 7, 13),
        side=16,
        parts=("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.0", "decoder.block_in.resnets.0.conv1.conv",
               "encoder.norm_out", "encoder.down_blocks.1.conv_in"),
        adapter="up_blocks.0.resnets.0.conv1.conv",
    ),
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    """A small model whose parameters are all at work: biases, norms and factors are not left at their trivial start."""
    import diffusers

    case = VAES[name]
    return randomized(getattr(diffusers, case.model)(**{**case.config, **changes}).eval())


def randomized(model: Any) -> Any:
    """Narrow parameters moved away from zero and one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # factors of noise stay zero: float64 draws other numbers
            narrow = parameter.ndim > 0 and parameter.numel() in (parameter.shape[0], parameter.shape[-1])
            if narrow and "per_channel_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def enable_tiling(name: str, model: Any) -> None:
    """Tiles of the model's least size that overlap by half."""
    case = VAES[name]
    model.enable_tiling(**case.tiling)
    if not case.tiling:
        for axis in ("height", "width"):
            setattr(model, f"tile_sample_min_{axis}", case.side)
            setattr(model, f"tile_sample_stride_{axis}", case.side // 2)


def clip(name: str, frames: int, batch: int = 1, wider: int = 0) -> torch.Tensor:
    """A random clip of a model's least size, perhaps wider by so many steps."""
    case = VAES[name]
    return torch.randn(batch, case.channels, frames, case.side, case.side + 16 * wider)


def encode(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Moments, or the latents of a model without a distribution."""
    posterior = model.encode(x).latent_dist
    found: torch.Tensor = posterior.parameters if hasattr(posterior, "parameters") else posterior.mode()
    return found


def latents(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The mode of the posterior."""
    found: torch.Tensor = model.encode(x).latent_dist.mode()
    return found


def decode(model: Any, z: torch.Tensor) -> torch.Tensor:
    """Frames of latents."""
    options = {"temb": torch.full_like(z[:, 0, 0, 0, 0], 0.05)} if model.config.get("timestep_conditioning") else {}
    found: torch.Tensor = model.decode(z, **options).sample
    return found


def in_double(model: Any) -> Any:
    """The same weights in float64, without the detours of upstream's upsampling and norms through float32."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, nn.Upsample):
            module.__class__ = nn.Upsample
        if type(module).__name__ == "RMSNorm":
            module.__class__ = _ExactNorm
    return double


class _ExactNorm(nn.Module):
    """diffusers' RMSNorm without weights, without its detour through float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def assert_vidtok_gradients(
    truth: dict[str, torch.Tensor], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> None:
    """L2 error of every gradient, at most twice the original's or a few roundings; the mix factors, which are one number
    each, are judged together. The gradient of a key's bias is zero: softmax does not see it."""
    assert after.keys() == before.keys() == truth.keys()
    groups = [[key] for key in truth if "mix_factor" not in key and "attn_1.k." not in key]
    for keys in [*groups, [key for key in truth if "mix_factor" in key]]:
        exact = torch.cat([truth[key].flatten() for key in keys])
        errors = [
            float((torch.cat([g[key].flatten() for key in keys]).double() - exact).norm() / exact.norm())
            for g in (before, after)
        ]
        assert errors[1] <= 2 * errors[0] + 2e-6, f"{keys[0]}: {errors}"


def nudged(x: torch.Tensor) -> torch.Tensor:
    """Every value moved to a neighbouring one, as `verify` does."""
    far = torch.where(torch.rand(x.shape) < 0.5, torch.inf, -torch.inf).to(x)
    return x.nextafter(far)


def check_call(
    call: Callable[[Any, torch.Tensor], torch.Tensor], models: tuple[Any, Any, Any], x: torch.Tensor, what: str
) -> torch.Tensor:
    """Error of the patched model at most twice that of the original (the worse of two runs, the second on inputs one
    rounding away: both sides may run the same convolutions, and one run against another is luck), plus a rounding."""
    original, patched, double = models
    expected, actual, truth = call(original, x), call(patched, x), call(double, x.double())
    others = expected, call(original, nudged(x))
    worse = max(others, key=lambda y: float((y.double() - truth).abs().max()))
    # A half-precision original returns one or the other format, as oneDNN likes the size.
    assert actual.stride() == expected.stride() or actual.dtype.itemsize < 4, what
    assert_within_promise(actual, worse, truth, what)
    return expected


def check(model: Any, x: torch.Tensor) -> None:
    """Patch a model; encoding and decoding keep the promise against the same weights in float64."""
    models = copy.deepcopy(model), model, in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        check_call(encode, models, x, "encoded")
        check_call(decode, models, latents(models[0], x), "decoded")


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum over the round trip, for the input and all parameters."""
    torch.manual_seed(1)  # for models that inject noise
    x = x.detach().requires_grad_()
    y = decode(model, latents(model, x))
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad((y * weight).sum(), [x, *model.parameters()], allow_unused=True)
    return {name: g for name, g in zip(["x", *names], found, strict=True) if g is not None}


Gradients = dict[str, torch.Tensor]


def assert_gradients_agree(originals: Sequence[Gradients], patched: Sequence[Gradients], truth: Gradients) -> None:
    """L2 error of every gradient at most twice the original's, or a few roundings.

    Each side runs several times, on inputs one rounding away: a norm over few values magnifies roundings, so that single
    runs of one and the same model differ by factors of five. The patched model's median counts. A gradient may cancel to
    nothing (a key's bias before softmax): none is held to less than the median noise per element, as in `verify`.
    """
    assert originals[0].keys() == patched[0].keys() == truth.keys()
    for key in [key for key in truth if "per_channel_scale" in key]:  # of noise, which float64 draws otherwise
        expected, actual = originals[0][key], patched[0][key]
        torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
        truth.pop(key)

    def errors(runs: Sequence[Gradients], key: str) -> list[float]:
        return sorted(float((run[key].double() - truth[key]).norm()) for run in runs)

    noise = {key: errors(originals, key)[-1] for key in truth}
    floor = sorted(n / truth[key].numel() ** 0.5 for key, n in noise.items())[len(noise) // 2]
    for key, exact in truth.items():
        error = errors(patched, key)[len(patched) // 2]
        allowed = max(2 * noise[key] + 2e-6 * float(exact.norm()), 2 * floor * exact.numel() ** 0.5)
        assert error <= allowed, f"gradient of {key}: {error} against {allowed}"
