# SPDX-License-Identifier: Apache-2.0
"""Rules for the causal VAE in HunyuanVideo's own files (`hyvideo.vae`), and copies of it, found by the digests of their methods.

Open-Sora 2.0's was made from it, and is served by the same code: here blocks take a time embedding, which no published model
has, the middle block makes its mask of N x N numbers by itself, and torch's own convolution is inside the causal one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vidkernels.patching._guard import guarded
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import diffusers_hunyuan_vae as hunyuan
from vidkernels.patching.rules import official_opensora2_vae as opensora2
from vidkernels.patching.rules._vae_memory import overwriting
from vidkernels.patching.rules._vae_units import channels_last


def _embedding_reason(embedding: Any) -> str | None:
    return None if embedding is None else "an embedding is given"


class BlockForward(opensora2.Block):
    """`ResnetBlockCausal3D.forward`."""

    @guarded
    def forward(self, input_tensor: Tensor, temb: Any, scale: float = 1.0) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        return self._serve(input_tensor)

    def _reason(self, input_tensor: Tensor, temb: Any = None, **rest: Any) -> str | None:
        return _embedding_reason(temb) or _sampling_reason(self) or self._clip_reason(input_tensor)


def _sampling_reason(block: Any) -> str | None:
    """Why what else a block does between its norms is not served."""
    if block.upsample is not None or block.downsample is not None:
        return "it samples up or down"
    return None if block.time_emb_proj is None else "it projects a time embedding"


def _norms_check(module: Any) -> str | None:
    """Norms that read an embedding: the original could be given none."""
    found = {type(norm).__name__ for norm in module.modules()} & {"AdaGroupNorm", "SpatialNorm"}
    return f"its norms read an embedding ({', '.join(sorted(found))})" if found else None


def _block_check(block: Any) -> str | None:
    return _norms_check(block) or opensora2.block_check(block) or _sampling_reason(block)


def _network_check(network: Any) -> str | None:
    return _norms_check(network) or units.silu_check(network)


class UpsampleForward(opensora2.Upsample):
    """`UpsampleCausal3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, output_size: Any = None, scale: float = 1.0) -> Tensor:
        """[B, C, T, H, W] -> [B, K, 1 + (T - 1) f0, H f1, W f2]."""
        return self._serve(hidden_states)

    def _reason(self, hidden_states: Tensor, output_size: Any, **rest: Any) -> str | None:
        reason = None if output_size is None else "an output size is given"
        return reason or _upsample_check(self) or self._clip_reason(hidden_states)


def _upsample_check(module: Any) -> str | None:
    usual = module.norm is None and module.interpolate and module.use_conv and not module.use_conv_transpose
    if not usual or module.name != "conv":
        return "it does more or less than repeat values in front of its convolution"
    return hunyuan.upsample_check(module)


class MidBlockForward(hunyuan.MidBlockForward):
    """`UNetMidBlockCausal3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Any = None) -> Tensor:
        """[B, C, T, H, W]; residual blocks and, between them, causal attention over all positions."""
        return self._serve(hidden_states)

    def _reason(self, hidden_states: Tensor, temb: Any = None) -> str | None:
        return _embedding_reason(temb) or super()._reason(hidden_states)

    def _resnet(self, resnet: Any, x: Tensor) -> Tensor:
        return channels_last(resnet(x, None))


class EncoderForward(opensora2.Network):
    """`EncoderCausal3D.forward`."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / 4, H / 8, W / 8]."""
        with overwriting(self, sample):
            x = self.conv_in(channels_last(sample))
            for block in [*self.down_blocks, self.mid_block]:
                x = block(x)
        return self._end(x)


class DecoderForward(opensora2.Network):
    """`DecoderCausal3D.forward`."""

    @guarded
    def forward(self, sample: Tensor, latent_embeds: Any = None) -> Tensor:
        """Latents [B, z, T, H, W] -> frames [B, 3, 4 T - 3, 8 H, 8 W]."""
        with overwriting(self, sample):
            x = self.conv_in(channels_last(sample))
            x = self._call(self.mid_block, x).to(next(iter(self.up_blocks.parameters())).dtype)
            for block in self.up_blocks:
                x = self._call(block, x)
        return self._end(x)

    def _reason(self, sample: Tensor, latent_embeds: Any = None, **rest: Any) -> str | None:
        return _embedding_reason(latent_embeds) or super()._reason(sample)

    def _call(self, block: Any, x: Tensor) -> Tensor:
        recomputed = self.training and self.gradient_checkpointing
        y: Tensor = checkpoint(block, x, None, use_reentrant=False) if recomputed else block(x, None)
        return y


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _block_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*_sample(module)[0], None), {}


_HOME = "hyvideo.vae"
_TESTED = ("Tencent-Hunyuan/HunyuanVideo (ffb9cd8)",)
_CONV = {"CausalConv3d.__init__": ("391c2e4db8e3d5f6",), "CausalConv3d.forward": ("3fc0fb271b2dbda5",)}
_MASK = {"prepare_causal_attention_mask": ("38c946e91a502c9f", "907440246e5d8a9d")}  # row by row; all at once
_BOTH = ("causal_conv3d", "group_norm")


def _rule(
    name: str, target: str, mixin: type, digests: Mapping[str, tuple[str, ...]], features: str, **more: Any
) -> Rule:
    return Rule(
        name=f"hunyuan_vae.{name}",
        ops=more.pop("ops", _BOTH),
        targets=(f"{_HOME}.{target}",),
        mixin=mixin,
        digests=digests,
        features=tuple(features.split()),
        reads=more.pop("reads", ("*",)),
        sample=more.pop("sample", _sample),
        tested_versions=_TESTED,
        **more,
    )


def _network(name: str, target: str, mixin: type, features: str, *digests: str) -> Rule:
    known = {f"{target.partition(':')[2]}.forward": digests}
    features = f"conv_in conv_out conv_norm_out mid_block {features}"
    options: dict[str, Any] = {"ops": ("group_norm",), "check": _network_check, "reads": ("conv_norm_out",)}
    return _rule(name, target, mixin, known, features, **options)


_UNET = "unet_causal_3d_blocks"

RULES = (
    _network("encoder", "vae:EncoderCausal3D", EncoderForward, "down_blocks", "efb9845652493e16"),
    _network(
        *("decoder", "vae:DecoderCausal3D", DecoderForward, "up_blocks gradient_checkpointing"),
        *("95c7e10c1d1db3b2", "b62eb44b830f8301"),
    ),
    _rule(
        *("mid_block", f"{_UNET}:UNetMidBlockCausal3D", MidBlockForward),
        {"UNetMidBlockCausal3D.forward": ("c55be78e50537df2",), **_MASK},
        "attentions resnets",
        ops=("group_norm",),
        reads=("attentions.0", "attentions.0.group_norm"),
        check=_norms_check,
    ),
    _rule(
        *("resnet", f"{_UNET}:ResnetBlockCausal3D", BlockForward),
        _CONV | {"ResnetBlockCausal3D.forward": ("a3e07296022ab9d1",)},
        "norm1 conv1.conv norm2 conv2.conv nonlinearity time_embedding_norm output_scale_factor",
        check=_block_check,
        sample=_block_sample,
    ),
    _rule(
        *("upsample", f"{_UNET}:UpsampleCausal3D", UpsampleForward),
        _CONV | {"UpsampleCausal3D.forward": ("322d91dfb1d5475b", "e893baff8c8f90f1")},
        "conv.conv upsample_factor interpolate",
        ops=("causal_conv3d",),
        check=_upsample_check,
    ),
    _rule(
        *("conv", f"{_UNET}:CausalConv3d", opensora2.ConvForward, _CONV, "conv pad_mode time_causal_padding"),
        ops=("causal_conv3d",),
        check=hunyuan.padding_check,
    ),
)
