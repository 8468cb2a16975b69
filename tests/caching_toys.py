# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family that a step cache serves, each with a function that runs one denoising step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from golden_rules import LATTE, draw, fill_transformer, manifest
from torch import Tensor, nn

from vidkernels.caching import CacheHandle, adacache
from vidkernels.models.transformers import Latte, STDiT3
from vidkernels.sampling import shift_time
from vidkernels.sampling.rectified_flow import open_sora_shift

FAMILIES = ("cogvideox", "wan", "hunyuan", "ltx", "mochi", "allegro", "latte", "ltx2")
Step = Callable[[int], Tensor]
_HEADS = {"num_attention_heads": 2}


TRACES = json.loads((LATTE / "adacache_trace.json").read_text())
RESIDUAL = {"t-attn": "temporal-attention", "s-attn": "spatial-attention", "ca-mlp": "cross-and-mlp"}


def traced_model() -> STDiT3:
    """The tiny STDiT3 of RULE.md with only its slow timestep features."""
    model = fill_transformer(STDiT3.from_config(manifest("stdit3.json.gz")["_tiny_config"]))
    with torch.no_grad():
        model.t_embedder.mlp[0].weight[:, :64] = 0
        model.t_embedder.mlp[0].weight[:, 128:192] = 0
    return model


@torch.inference_mode()
def open_sora_sample(model: STDiT3, config: dict) -> Tensor:
    """Open-Sora 1.2's sampling loop: Euler on shifted times, guidance in one batch, optional conditioning frames."""
    batch, steps = config["batch"], config["num_sampling_steps"]
    z, prompt = draw("trace/z", batch, 4, 5, 8, 12), draw("trace/y", batch, 1, 20, 32)
    mask = torch.zeros(batch, 20)
    mask[:, :9] = 1
    captions = torch.cat([prompt, model.y_embedder.y_embedding.expand(batch, 1, -1, -1)])
    shift = open_sora_shift(64, 96, 15)
    times = [1000 * shift_time(torch.tensor(1 - i / steps, dtype=torch.float64), shift).item() for i in range(steps)]
    size = {"fps": torch.tensor([24.0]), "height": torch.tensor([64.0]), "width": torch.tensor([96.0])}
    keep = (
        None
        if config["mask"] is None
        else torch.tensor(config["mask"], dtype=torch.float32).reshape(-1, 5).expand(batch, 5)
    )
    noise_added = None if keep is None else keep == 1
    for index, t in enumerate(times):
        extra = {}
        if keep is not None:
            active = keep * 1000 >= t
            assert noise_added is not None and not (active & ~noise_added).any()  # no partial edits in the traces
            extra = {"x_mask": active.repeat(2, 1)}
        output = model(torch.cat([z, z]), torch.full((2 * batch,), t), captions, mask, **size, **extra).chunk(2, 1)[0]
        conditional, null = output.chunk(2)
        step = (t - (times[index + 1] if index + 1 < steps else 0.0)) / 1000
        moved = z + (null + config["cfg_scale"] * (conditional - null)) * step
        z = moved if keep is None else torch.where(active[:, None, :, None, None], moved, z)
    return z


def install(model: nn.Module, config: dict) -> CacheHandle:
    codebook = tuple((float(threshold), int(rate)) for threshold, rate in config["codebook"])
    window = tuple(config["moreg_steps"]) if config.get("moreg_steps") else None
    return adacache(
        model,
        config["num_sampling_steps"],
        codebook=codebook,
        motion=config["apply_moreg"],
        motion_window=window,
        motion_scale=config.get("moreg_hyp", [0.385])[0],
        residual=RESIDUAL[config["cache_res"]],
        locations=config["cache_loc"],
    )


def latte() -> Latte:
    torch.manual_seed(0)
    model = Latte.from_config({"depth": 4, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_frames": 4})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.eval()


def run_steps(model: nn.Module, steps: int, calls: int = 1) -> list[Tensor]:
    x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    with torch.inference_mode():
        for step in range(steps):
            t = torch.full((2,), 999.0 - 10 * step)
            outputs += [model(half, t[: len(half)]) for half in x.chunk(calls)]
    return outputs


def _cogvideox(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        **_HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8, num_layers=3,
        sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=6,
    )  # fmt: skip
    return model, torch.randn(2, 2, 4, 8, 8), {"encoder_hidden_states": torch.randn(2, 6, 8)}


def _wan(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        **_HEADS, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3,
        rope_max_seq_len=32,
    )  # fmt: skip
    return model, torch.randn(2, 4, 2, 8, 8), {"encoder_hidden_states": torch.randn(2, 6, 16)}


def _hunyuan(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **_HEADS, attention_head_dim=10, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    options = {"encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": mask}
    options |= {"pooled_projections": torch.randn(2, 8), "guidance": torch.tensor([6.0, 6.0])}
    return model, torch.randn(2, 4, 2, 8, 8), options


def _ltx(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        **_HEADS,
        in_channels=8,
        out_channels=8,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=16,
    )
    options = {"encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": torch.ones(2, 6)}
    return model, torch.randn(2, 2 * 4 * 4, 8), {**options, "num_frames": 2, "height": 4, "width": 4}


def _mochi(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.MochiTransformer3DModel(
        **_HEADS, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=4, max_sequence_length=6,
    )  # fmt: skip
    options = {"encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": torch.ones(2, 6)}
    return model, torch.randn(2, 4, 2, 8, 8), options


def _allegro(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = diffusers.AllegroTransformer3DModel(
        **_HEADS, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=3, cross_attention_dim=48, sample_height=8,
        sample_width=8, sample_frames=2, caption_channels=8,
    )  # fmt: skip
    rotary = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 2)
    axes = (torch.arange(size) for size in (2, 4, 4))
    positions = torch.cartesian_prod(*axes).T.reshape(3, 1, -1)
    options = {
        "encoder_hidden_states": torch.randn(2, 6, 8),
        "encoder_attention_mask": torch.ones(2, 6),
        "attention_mask": torch.ones(2, 2, 8, 8),
        "image_rotary_emb": (rotary[:3], tuple(positions)),
    }
    return model, torch.randn(2, 4, 2, 8, 8), options


def _latte(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model = diffusers.LatteTransformer3DModel(**manifest("latte_diffusers.json.gz")["_config_tiny"])
    return model, torch.randn(2, 4, 5, 8, 8), {"encoder_hidden_states": torch.randn(2, 7, 32)}


def _ltx2(diffusers: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """Two token streams, video and audio; neither is the text."""
    model = diffusers.LTX2VideoTransformer3DModel(
        **_HEADS, in_channels=8, out_channels=8, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=3, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    options = {"audio_hidden_states": torch.randn(2, 5, 4), "encoder_hidden_states": torch.randn(2, 6, 16)}
    options |= {"audio_encoder_hidden_states": torch.randn(2, 6, 16), "audio_num_frames": 5, "fps": 25.0}
    return model, torch.randn(2, 2 * 4 * 4, 8), {**options, "num_frames": 2, "height": 4, "width": 4}


_BUILDERS: dict[str, Callable[[Any], tuple[nn.Module, Tensor, dict[str, Any]]]] = {
    "cogvideox": _cogvideox, "wan": _wan, "hunyuan": _hunyuan, "ltx": _ltx, "mochi": _mochi, "allegro": _allegro,
    "latte": _latte, "ltx2": _ltx2,
}  # fmt: skip


def diffusers_model(family: str, diffusers: Any, device: torch.device | str = "cpu") -> tuple[nn.Module, Step]:
    """A model and `run(step)`, its prediction at a time that falls with the step."""
    torch.manual_seed(0)
    model, *given = _BUILDERS[family](diffusers)
    model = model.eval().to(device)
    x, options = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), given)

    @torch.inference_mode()
    def run(step: int, rows: slice = slice(None)) -> Tensor:
        own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
        time = torch.full((2,), 900 - 10 * step, device=device)[rows]
        return model(hidden_states=x[rows], timestep=time, **own)[0]

    return model, run


class _Attention(nn.Module):
    """Self-attention of Open-Sora's block over [rows, tokens, C]: per-head RMSNorm, rotation over time."""

    def __init__(self, ours: nn.Module, frequencies: Tensor | None) -> None:
        super().__init__()
        self.qkv, self.proj, self.q_norm, self.k_norm = ours.qkv, ours.proj, ours.q_norm, ours.k_norm
        self.heads, self.frequencies = ours.heads, frequencies

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            F.rms_norm(q, q.shape[-1:], self.q_norm.weight, 1e-6),
            F.rms_norm(k, k.shape[-1:], self.k_norm.weight, 1e-6),
        )
        if self.frequencies is not None:
            q, k = self._rotate(q), self._rotate(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.frequencies
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)


class OpenSoraBlock(nn.Module):
    """The published block's attributes and call: forward(x [B, T*S, C], y, t, mask, x_mask, t0, T, S)."""

    def __init__(self, ours: nn.Module, width: int, temporal: bool, frequencies: Tensor) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = _Attention(ours.attn, frequencies if temporal else None)
        self.cross_attn, self.mlp, self.scale_shift_table = ours.cross_attn, ours.mlp, ours.scale_shift_table

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        rows = (self.scale_shift_table[None] + t.reshape(len(x), 6, -1))[:, :, None, None]
        if x_mask is not None:
            clean = (self.scale_shift_table[None] + t0.reshape(len(x), 6, -1))[:, :, None, None]
            rows = torch.where(x_mask[:, None, :, None, None], rows, clean)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        modulated = self.norm1(x).unflatten(1, (T, S)) * (1 + scale1) + shift1
        folded = modulated.transpose(1, 2).flatten(0, 1) if self.temporal else modulated.flatten(0, 1)
        mixed = self.attn(folded).unflatten(0, (len(x), -1))
        x = x + (gate1 * (mixed.transpose(1, 2) if self.temporal else mixed)).flatten(1, 2)
        x = x + self.cross_attn(x, y)
        modulated = self.norm2(x).unflatten(1, (T, S)) * (1 + scale2) + shift2
        return x + (gate2 * self.mlp(modulated)).flatten(1, 2)


class OpenSoraModel(nn.Module):
    """Open-Sora's loop over its blocks around the embeddings of this package's STDiT3."""

    def __init__(self, ours: STDiT3) -> None:
        super().__init__()
        self.ours, width = [ours], ours.config.hidden_size  # a list: not a child
        self.y_embedder = ours.y_embedder
        made = [
            [OpenSoraBlock(block, width, temporal, ours.rope.freqs) for block in blocks]
            for temporal, blocks in enumerate((ours.spatial_blocks, ours.temporal_blocks))
        ]
        self.spatial_blocks, self.temporal_blocks = nn.ModuleList(made[0]), nn.ModuleList(made[1])

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor, **options: Any) -> Tensor:
        ours, outer = self.ours[0], self
        x_mask = options.get("x_mask")

        def call(block: nn.Module, tokens: Tensor, captions: Any, six: Tensor, clean: Any, *rest: Any) -> Tensor:
            theirs = outer.find(block)
            grid = tokens.shape[1:3]
            zero = None if clean is None else clean.flatten(1)
            return theirs(tokens.flatten(1, 2), captions, six.flatten(1), None, x_mask, zero, *grid).unflatten(1, grid)

        ours._call = call  # type: ignore[method-assign]
        try:
            return ours(x, timestep, y, mask, **options)
        finally:
            del ours._call

    def find(self, block: nn.Module) -> nn.Module:
        """Their block for one of ours."""
        for name in ("spatial_blocks", "temporal_blocks"):
            for own, theirs in zip(getattr(self.ours[0], name), getattr(self, name), strict=True):
                if own is block:
                    return theirs
        raise AssertionError
