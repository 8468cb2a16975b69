# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLWan (2.1 and 2.2). What the forwards do is said in `_wan_units`."""

from __future__ import annotations

from typing import Any

from torch import nn

from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import _wan_shortcuts as shortcuts
from vidkernels.patching.rules import _wan_units as wan
from vidkernels.patching.rules._wan_calls import AutoencoderCalls


def clip_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = next(p.shape for name, p in module.named_parameters() if name.endswith(("gamma", "weight")))
    width = channels[0] if len(channels) < 5 else channels[1]
    return (units.like_parameters(module, 1, width, 3, 12, 12),), {}


def norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 2, module.gamma.numel(), *(4,) * (module.gamma.ndim - 1)),), {}


def resample_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.dim, 3, 12, 12),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv_in.in_channels, 1, 32, 32),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Without `first_chunk`, Wan 2.2's shortcuts double the frames, the convolutions beside them without a cache do not.
    shortcuts = any(getattr(block, "avg_shortcut", None) is not None for block in module.up_blocks)
    options = {"first_chunk": True} if shortcuts else {}
    return (units.like_parameters(module, 1, module.conv_in.in_channels, 1, 4, 4),), options


def _autoencoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = module.encoder.conv_in.in_channels // (getattr(module.config, "patch_size", None) or 1) ** 2
    return (units.like_parameters(module, 1, channels, 5, 32, 32),), {"return_dict": False}


def resample_check(module: Any) -> str | None:
    return "it resamples nothing" if module.mode == "none" else None


def widen(module: nn.Module) -> nn.Module:
    """float64 without the detour through float32 that upstream's upsampling takes."""
    double = module.double()
    for child in double.modules():
        if isinstance(child, nn.Upsample):
            child.__class__ = nn.Upsample
    return double


_BLOCK_OPS = ("causal_conv3d", "channel_norm")
# Part of a rule's name, upstream's class, ops, further classes whose code is stood in for, sample, check.
_PARTS: tuple[tuple[str, str, tuple[str, ...], str, Any, Any], ...] = (
    ("autoencoder", "AutoencoderKL", ("causal_conv3d",), "", _autoencoder_sample, None),
    ("encoder", "Encoder3d", _BLOCK_OPS, "CausalConv3d RMS_norm", _encoder_sample, None),
    ("decoder", "Decoder3d", _BLOCK_OPS, "CausalConv3d RMS_norm", _decoder_sample, None),
    ("resnet", "ResidualBlock", _BLOCK_OPS, "CausalConv3d RMS_norm", clip_sample, None),
    ("attention", "AttentionBlock", _BLOCK_OPS, "RMS_norm", clip_sample, None),
    ("resample", "Resample", ("causal_conv3d",), "CausalConv3d Upsample", resample_sample, resample_check),
    ("conv", "CausalConv3d", ("causal_conv3d",), "", clip_sample, None),
    ("norm", "RMS_norm", ("channel_norm",), "", norm_sample, None),
)


def rules_of(family: str, path: str, prefix: str, mixins: dict[str, type], digests: dict[str, str]) -> tuple[Rule, ...]:
    """The rules of one library of Wan's kind; `digests` by upstream names without their prefix."""
    found = []
    for part, name, used, others, sample, check in _PARTS:
        whole = name + prefix if name == "AutoencoderKL" else prefix + name
        wanted = {whole: name} | {prefix + other: other for other in others.split()}
        known = {
            f"{full}.{key.partition('.')[2]}": (value,)
            for full, short in wanted.items()
            for key, value in digests.items()
            if key.partition(".")[0] == short
        }
        rule = Rule(
            name=f"diffusers.{family}.{part}",
            ops=used,
            targets=(f"{path}:{whole}",),
            mixin=mixins[part],
            digests=known,
            check=check,
            widen=widen,
            sample=sample,
            tested_versions=units.TESTED,
        )
        found.append(rule)
    return tuple(found)


def down_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # One frame: without a cache only the shortcut would halve more.
    return (units.like_parameters(module, 1, module.avg_shortcut.in_channels, 1, 12, 12),), {}


def _up_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Without a cache the frames stay, which only the first chunk's shortcut fits.
    return (units.like_parameters(module, 1, module.in_dim, 1, 6, 6),), {"first_chunk": True}


def _shortcut_rule(part: str, name: str, shortcut: str, mixin: type, sample: Any, *digests: str) -> Rule:
    """A rule for a block of Wan 2.2; digests of its forward, its shortcut's and the shortcut's constructor."""
    names = f"{name}.forward", f"{shortcut}.forward", f"{shortcut}.__init__"
    return units.rule(
        f"wan_vae.{part}",
        f"autoencoder_kl_wan:{name}",
        mixin,
        "causal_conv3d",
        dict(zip(names, digests, strict=True)),
        sample,
        shortcuts.shortcut_check,
        widen=widen,
    )


_PATH = "diffusers.models.autoencoders.autoencoder_kl_wan"

RULES = rules_of(
    "wan_vae",
    _PATH,
    "Wan",
    {
        "autoencoder": AutoencoderCalls,
        "encoder": wan.EncoderForward,
        "decoder": wan.DecoderForward,
        "resnet": wan.BlockForward,
        "attention": wan.AttentionForward,
        "resample": wan.ResampleForward,
        "conv": wan.ConvForward,
        "norm": wan.NormForward,
    },
    {
        "CausalConv3d.__init__": "0c3953057471ddb3",
        "CausalConv3d.forward": "01f7c335892ddd78",
        "RMS_norm.__init__": "17913286caba9a38",
        "RMS_norm.forward": "26957f57a59329b9",
        "ResidualBlock.__init__": "d9f731588d1e22dd",
        "ResidualBlock.forward": "a6b9568bc5a70f8d",
        "AttentionBlock.forward": "75f7ae84894b3181",
        "Upsample.forward": "6c83557b0cc12256",
        "Resample.__init__": "480735af1d1ffe2a",
        "Resample.forward": "34c37062cd301010",
        "Encoder3d.forward": "8da475120152eb53",
        "Decoder3d.forward": "458ce4c17e1d6c3e",
        "AutoencoderKL._encode": "84747a65c1539d9a",
        "AutoencoderKL._decode": "32623bf632f52c8c",
        "AutoencoderKL.clear_cache": "63005fb471f1e828",
    },
)
RULES += (
    _shortcut_rule(
        *("down_block", "WanResidualDownBlock", "AvgDown3D", shortcuts.DownBlockForward, down_sample),
        *("5282dd8094bcfd18", "093c658178239315", "9d631730726f0d01"),
    ),
    _shortcut_rule(
        *("up_block", "WanResidualUpBlock", "DupUp3D", shortcuts.UpBlockForward, _up_sample),
        *("b52a83620975007e", "16820f8a345bea52", "a8f6a98cd9eb200e"),
    ),
)
