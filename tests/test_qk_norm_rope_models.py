# SPDX-License-Identifier: Apache-2.0
"""ops.qk_norm_rope against the rotary embeddings and query/key norms of the video transformers in diffusers.

Two questions per model: does the float64 reference compute the same function (up to the float32 tables of the model),
and is the float32 kernel at least as accurate as the model's own code?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import EPS, assert_within_promise
from torch import Tensor

from vidkernels import errors, ops
from vidkernels import nn as vk_nn
from vidkernels._reference import qk_norm_rope as reference
from vidkernels.nn import RotaryConfig, video_positions

diffusers = pytest.importorskip("diffusers")
from diffusers.models import embeddings  # noqa: E402
from diffusers.models.normalization import RMSNorm  # noqa: E402

FRAMES, HEIGHT, WIDTH = 3, 4, 5
TOKENS = FRAMES * HEIGHT * WIDTH
LATENT = torch.zeros(1, 16, FRAMES, HEIGHT, WIDTH)


@dataclass
class Model:
    """Heads, the model's own function on q [1, T, H, D] and a weight, and our options for the same."""

    heads: int
    head_dim: int
    theirs: Callable[[Tensor, Tensor | None], Tensor]
    positions: Tensor
    options: dict[str, object]
    norm: str | None = None
    largest_angle: float = 8.0


def _options(rotary: RotaryConfig) -> dict[str, object]:
    return {name: getattr(rotary, name) for name in ("axes", "theta", "position_scale", "layout")}


def _normed(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """diffusers' RMSNorm over the last axis, in the dtype of x."""
    norm = RMSNorm(x.shape[-1], eps=eps).to(x.dtype)
    norm.weight = torch.nn.Parameter(weight.to(x.dtype))
    # RMSNorm takes the mean square in float32 only; in float64 torch's own function is the same formula.
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps) if x.dtype == torch.float64 else norm(x)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, dim: int = -1) -> Tensor:
    """diffusers' apply_rotary_emb on [1, T, H, D]; it casts to float32, so float64 gets the same lines without the cast."""
    if x.dtype == torch.float32:
        return embeddings.apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=dim, sequence_dim=1)
    a, b = x.unflatten(-1, (-1, 2) if dim == -1 else (2, -1)).unbind(dim)
    turned = torch.stack((-b, a), -1).flatten(-2) if dim == -1 else torch.cat((-b, a), -1)
    return x * cos[None, :, None] + turned * sin[None, :, None]


def cogvideox() -> Model:
    cos, sin = embeddings.get_3d_rotary_pos_embed(64, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), FRAMES)
    options = _options(RotaryConfig.cogvideox(64))
    return Model(2, 64, lambda x, _: _turn(x, cos, sin), video_positions(FRAMES, HEIGHT, WIDTH), options)


def wan() -> Model:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    cos, sin = (t[0, :, 0] for t in WanRotaryPosEmbed(128, (1, 1, 1), 16)(LATENT))

    def theirs(x: Tensor, weight: Tensor | None) -> Tensor:
        return _turn(_normed(x.flatten(2), weight).unflatten(2, (-1, 128)), cos, sin)

    return Model(3, 128, theirs, video_positions(FRAMES, HEIGHT, WIDTH), _options(RotaryConfig.wan(128)), "full")


def hunyuan_video() -> Model:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    cos, sin = HunyuanVideoRotaryPosEmbed(1, 1, [16, 56, 56], 256.0)(LATENT)
    options = _options(RotaryConfig.hunyuan_video())
    grid = video_positions(FRAMES, HEIGHT, WIDTH)
    return Model(2, 128, lambda x, weight: _turn(_normed(x, weight), cos, sin), grid, options, "head")


def cosmos() -> Model:
    from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed

    cos, sin = CosmosRotaryPosEmbed(128, patch_size=(1, 1, 1))(LATENT, fps=16)
    options = _options(RotaryConfig.cosmos(128, fps=16))
    grid = video_positions(FRAMES, HEIGHT, WIDTH)
    return Model(2, 128, lambda x, weight: _turn(_normed(x, weight), cos, sin, -2), grid, options, "head")


def allegro() -> Model:
    scale = (2.0, 2.0, 2.0)
    *tables, _, _, _ = embeddings.get_3d_rotary_pos_embed_allegro(
        96, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), FRAMES, interpolation_scale=scale
    )
    grid = video_positions(FRAMES, HEIGHT, WIDTH).long()

    def theirs(x: Tensor, weight: Tensor | None) -> Tensor:
        if x.dtype == torch.float32:
            positions = [p[None] for p in grid.unbind(-1)]
            return embeddings.apply_rotary_emb_allegro(x.transpose(1, 2), tables, positions).transpose(1, 2)
        thirds = [
            _turn(part, *(t[p] for t in table), -2)
            for part, table, p in zip(x.chunk(3, -1), tables, grid.unbind(-1), strict=True)
        ]
        return torch.cat(thirds, -1)

    return Model(2, 96, theirs, grid, _options(RotaryConfig.allegro(96, interpolation_scale=scale)))


def ltx() -> Model:
    from diffusers.models.transformers import transformer_ltx

    heads, head_dim = 4, 32  # 128 channels: two of them, 128 % 6, are not rotated
    coordinates = torch.rand(1, 3, TOKENS)
    rope = transformer_ltx.LTXVideoRotaryPosEmbed(128, base_num_frames=1, base_height=1, base_width=1)
    cos, sin = rope(LATENT, video_coords=coordinates)

    def theirs(x: Tensor, weight: Tensor | None) -> Tensor:
        flat = _normed(x.flatten(2), weight, 1e-5)
        turned = (
            transformer_ltx.apply_rotary_emb(flat, (cos, sin))
            if x.dtype == torch.float32
            else _turn(flat[:, :, None], cos[0], sin[0])
        )
        return turned.view_as(x)

    options = {"frequencies": vk_nn.ltx_frequencies(heads, head_dim), "eps": 1e-5}
    return Model(heads, head_dim, theirs, 2 * coordinates[0].T - 1, options, "full", largest_angle=1.6e4)


def mochi() -> Model:
    from diffusers.models.transformers.transformer_mochi import MochiRoPE

    rope, frequencies = MochiRoPE(), torch.randn(3, 4, 16)
    cos, sin = (t[None] for t in rope(frequencies, FRAMES, HEIGHT, WIDTH, dtype=torch.float32))

    def theirs(x: Tensor, weight: Tensor | None) -> Tensor:
        normed = _normed(x, weight, 1e-5)
        a, b = normed[..., 0::2], normed[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    positions = rope._get_positions(FRAMES, HEIGHT, WIDTH, dtype=torch.float32)
    return Model(4, 32, theirs, positions, {"frequencies": frequencies, "eps": 1e-5}, "head", largest_angle=600.0)


def stdit3() -> Model:
    """Open-Sora's temporal attention: complex multiplication over frames, frequencies as the checkpoint keeps them."""
    frames = torch.arange(TOKENS)
    stored = 10000.0 ** (-torch.arange(0, 72, 2) / 72)
    turn = torch.polar(torch.ones(TOKENS, 36), frames[:, None] * stored)

    def theirs(x: Tensor, weight: Tensor | None) -> Tensor:
        pairs = torch.view_as_complex(_normed(x, weight).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)

    return Model(2, 72, theirs, frames[:, None], {"frequencies": stored[None]}, "head", largest_angle=float(TOKENS))


MODELS = [cogvideox, wan, hunyuan_video, cosmos, allegro, ltx, mochi, stdit3]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_same_function_and_at_least_as_accurate(build: Callable[[], Model]) -> None:
    """The reference in float64 equals the model's code up to the rounding of its float32 angles, cosines and sines; the
    kernel in float32 keeps the promise with the model's float32 output in place of the reference's."""
    model = build()
    q = torch.randn(1, TOKENS, model.heads, model.head_dim)
    size = {"head": model.head_dim, "full": model.heads * model.head_dim, None: 0}[model.norm]
    weight = 1 + 0.3 * torch.randn(size) if size else None
    wide = None if weight is None else weight.double()
    options = {"positions": model.positions, "norm": model.norm, **model.options}
    truth, _ = reference.qk_norm_rope(q.double(), None, wide, **options)
    # An angle is a product of a rounded frequency (a power: 2 roundings) and a position: at most 4 roundings of itself.
    tables = (4 * model.largest_angle + 2) * EPS[torch.float32]
    difference = (model.theirs(q.double(), wide) - truth).abs().max().item()
    assert difference <= tables * truth.norm(dim=-1).max().item()
    actual, _ = ops.qk_norm_rope(q, None, weight, **options)
    assert_within_promise(actual, model.theirs(q, weight), truth)


def test_module_equals_the_op() -> None:
    """nn.QKNormRope holds weights named q_weight and k_weight and passes its convention on."""
    module = vk_nn.QKNormRope(4, 48, norm="full", kv_heads=2, rotary=RotaryConfig.wan(48), eps=1e-5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"q_weight": (192,), "k_weight": (96,)}
    torch.nn.init.normal_(module.q_weight)
    q, k = torch.randn(TOKENS, 4, 48), torch.randn(TOKENS, 2, 48)
    positions = video_positions(FRAMES, HEIGHT, WIDTH)
    expected = ops.qk_norm_rope(
        q, k, module.q_weight, module.k_weight, positions, norm="full", eps=1e-5, axes=(16, 16, 16)
    )
    assert all(torch.equal(a, e) for a, e in zip(module(q, k, positions), expected, strict=True))
    assert torch.equal(module(q, None, positions)[0], expected[0])
    bare = vk_nn.QKNormRope(4, 48, norm=None, elementwise_affine=True)
    assert not list(bare.parameters()) and torch.equal(bare(q, k, positions)[0], q)


def test_grid_order() -> None:
    """Rows run over t, then h, then w; the axis the reference turns is the one named."""
    grid = video_positions(2, 3, 4)
    assert grid.dtype == torch.int32 and grid[1 * 12 + 2 * 4 + 3].tolist() == [1, 2, 3]
    assert RotaryConfig.wan(64).axes == (24, 20, 20)
    with pytest.raises(errors.OptionError):
        RotaryConfig.cogvideox(72)
    with pytest.raises(errors.OptionError):
        RotaryConfig.allegro(64)
