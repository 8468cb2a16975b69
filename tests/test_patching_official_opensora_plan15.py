# SPDX-License-Identifier: Apache-2.0
"""The rule for the blocks of Open-Sora-Plan 1.5, on a block of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_promise
from official_vae_suite import GRADIENT_FLOOR, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vae_cases import nudged

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching.rules import official_opensora_plan as rules

pytest.importorskip("diffusers.models.attention")
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm

npu_config: Any = None
HEADS, HEAD, CONDITION = 2, 32, 24
WIDTH = HEADS * HEAD
GRID = (2, 3, 4)


class OpenSoraNormZero(nn.Module):
    def __init__(self, kind: Any, affine: bool) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(CONDITION, 6 * WIDTH)
        self.norm, self.norm_enc = (kind(WIDTH, eps=1e-6, elementwise_affine=affine) for _ in range(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        rows = self.linear(self.silu(temb))[None].chunk(6, 2)
        video = self.norm(hidden_states) * (1 + rows[1]) + rows[0]
        return video, self.norm_enc(encoder_hidden_states) * (1 + rows[4]) + rows[3], rows[2], rows[5]


class PositionGetter3D:
    def __call__(self, b: int, t: int, h: int, w: int, device: Any) -> Any:
        places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (t, h, w)))
        return [places[:, axis, None].expand(-1, b) for axis in range(3)], (t - 1, h - 1, w - 1)


class RoPE3D(nn.Module):
    """A quarter of a head turns by the frame, three eighths each by row and column."""

    def forward(self, dim: int, positions: Any, device: Any, dtype: torch.dtype) -> Any:
        places = positions[0]
        tables: list[Tensor] = []
        for share, last in zip((4, 6, 6), positions[1], strict=True):
            width = dim // 16 * share
            rates = 1.0 / (1e4 ** (torch.arange(0, width, 2, device=device) / width))
            angles = torch.outer(torch.arange(last + 1, device=device), rates).to(dtype).repeat(1, 2)
            tables += [angles.cos(), angles.sin()]
        return (places, *tables)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def apply_rope1d(tokens: Tensor, places: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table[places].unsqueeze(2) for table in (cos, sin))
    return tokens * cos + rotate_half(tokens) * sin


def apply_rotary_emb(tokens: Tensor, tables: Any) -> Tensor:
    places, *found = tables
    unit = tokens.shape[-1] // 16
    axes = tokens.split([4 * unit, 6 * unit, 6 * unit], -1)
    return torch.cat([apply_rope1d(axes[i], places[i], *found[2 * i : 2 * i + 2]) for i in range(3)], -1)


class OpenSoraAttnProcessor2_0:  # noqa: N801
    def __init__(self, sparse_n: int, sparse_group: bool) -> None:
        self.sparse1d, self.sparse_n, self.sparse_group = sparse_n > 1, sparse_n, sparse_group

    def _sparse_1d(self, x: Tensor, frame: int, height: int, width: int) -> tuple[Tensor, int]:
        assert x.shape[0] == frame * height * width
        more, step = -x.shape[0] % self.sparse_n**2, self.sparse_n
        x = F.pad(x, (0, 0, 0, 0, 0, more))
        if not self.sparse_group:
            return x.unflatten(0, (-1, step)).flatten(1, 2), more
        return x.unflatten(0, (-1, step, step)).transpose(1, 2).flatten(2, 3).flatten(0, 1), more

    def _reverse_sparse_1d(self, x: Tensor, frame: int, height: int, width: int, pad_len: int) -> Tensor:
        step = self.sparse_n
        x = x.unflatten(1, (step, -1))
        x = x.unflatten(0, (-1, step)).transpose(1, 2).flatten(0, 2) if self.sparse_group else x.flatten(0, 1)
        return x[: frame * height * width]

    def _sparse_1d_enc(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.sparse_n, 1)

    def _reverse_sparse_1d_enc(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.sparse_n, -1)).mean(1)

    def __call__(
        self, attn: Any, x: Tensor, text: Tensor, sizes: Any, attention_mask: Any, video_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x) for layer in (attn.to_q, attn.to_k, attn.to_v))
        words = [layer(text) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        q, k = (norm(t.unflatten(2, (HEADS, -1))) for norm, t in ((attn.norm_q, q), (attn.norm_k, k)))
        q, k = (apply_rotary_emb(t, video_rotary_emb).flatten(2) for t in (q, k))
        for index, norm in enumerate((attn.norm_added_q, attn.norm_added_k)):
            words[index] = norm(words[index].unflatten(2, (HEADS, -1))).flatten(2)
        pairs, more = list(zip((q, k, v), words, strict=True)), 0
        if self.sparse1d:
            more = self._sparse_1d(q, *sizes)[1]
            pairs = [(self._sparse_1d(a, *sizes)[0], self._sparse_1d_enc(b)) for a, b in pairs]
        rows = (torch.cat(pair).unflatten(2, (HEADS, -1)).permute(1, 2, 0, 3) for pair in pairs)
        mixed = F.scaled_dot_product_attention(*rows, attention_mask).permute(2, 0, 1, 3).flatten(2)
        video, said = mixed[: -text.shape[0]], mixed[-text.shape[0] :]
        if self.sparse1d:
            video, said = self._reverse_sparse_1d(video, *sizes, more), self._reverse_sparse_1d_enc(said)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, said if attn.context_pre_only else attn.to_add_out(said)


class Attention(nn.Module):
    def __init__(self, kind: Any, processor: Any, last: bool) -> None:
        super().__init__()
        self.heads, self.processor, self.context_pre_only = HEADS, processor, last
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, kind(HEAD, eps=1e-6, elementwise_affine=True))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        self.to_add_out = None if last else nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        sizes = tuple(options.pop(name) for name in ("frame", "height", "width"))
        return self.processor(self, x, encoder_hidden_states, sizes, **options)


class BasicTransformerBlock(nn.Module):
    def __init__(
        self, kind: Any = nn.RMSNorm, sparse: tuple[int, bool] = (1, False), last: bool = False, affine: bool = True
    ):
        super().__init__()
        self.attention_head_dim = HEAD
        self.norm1, self.norm2 = OpenSoraNormZero(kind, affine), OpenSoraNormZero(kind, affine)
        self.attn1 = Attention(kind, OpenSoraAttnProcessor2_0(*sparse), last)
        self.ff = FeedForward(WIDTH, activation_fn="gelu-approximate")
        self.rope, self.position_getter = RoPE3D(), PositionGetter3D()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        embedded_timestep: Any = None,
        frame: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, count = hidden_states, encoder_hidden_states, hidden_states.shape[0]
        places = self.position_getter(x.shape[1], t=frame, h=height, w=width, device=x.device)
        options: dict[str, Any] = {"attention_mask": attention_mask, "frame": frame, "height": height, "width": width}
        options["video_rotary_emb"] = self.rope(self.attention_head_dim, places, x.device, x.dtype)
        video, words, gate, text_gate = self.norm1(x, text, embedded_timestep)
        video, words = self.attn1(video, encoder_hidden_states=words, **options)
        x, text = x + gate * video, text + text_gate * words
        video, words, gate, text_gate = self.norm2(x, text, embedded_timestep)
        both = self.ff(torch.cat([video, words]))
        return x + gate * both[:count], text + text_gate * both[count:]


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "layer norms": {"kind": nn.LayerNorm},
    "without weights": {"affine": False},
    "every second": {"sparse": (2, False)},
    "groups": {"sparse": (2, True), "kind": nn.LayerNorm},
    "padded groups": {"sparse": (4, True)},
    "last": {"last": True},
}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    own = [rule for rule in rules.RULES if rule.name == "official.plan_joint_block"]
    yield from knowing(own, sys.modules[__name__])


def ready(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BasicTransformerBlock(**CASES[name])
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return block.eval()


def inputs(batch: int, dtype: torch.dtype = torch.float32, masked: bool = False) -> dict[str, Any]:
    torch.manual_seed(batch)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(24, batch, WIDTH),
        "encoder_hidden_states": torch.randn(5, batch, WIDTH),
        "embedded_timestep": torch.randn(batch, CONDITION),
    }
    if masked:
        given["attention_mask"] = torch.where(torch.rand(batch, 1, 29, 29) < 0.2, -1e4, 0.0)
    return {**cast(given, dtype), **dict(zip(("frame", "height", "width"), GRID, strict=True))}


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in given.items()}


def patched(block: nn.Module) -> nn.Module:
    report = vidkernels.patch(block)
    assert "test.official.plan_joint_block" in [entry.rule for entry in report.patched], report.details()
    assert not report.near_misses
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results(name: str, dtype: torch.dtype) -> None:
    for batch in (1, 2, 3):
        block = ready(name).to(dtype)
        original, double = copy.deepcopy(block), copy.deepcopy(block).double()
        given = inputs(batch, dtype, masked=batch == 2 and name == "dense")
        kept = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
        with torch.no_grad():
            truth, actual = double(**cast(given, torch.float64)), patched(block)(**given)
            near = {**given, "hidden_states": nudged(given["hidden_states"])}
            runs = original(**given), original(**near)
        for index, exact in enumerate(truth):
            expected = max((y[index] for y in runs), key=lambda y: float((y.double() - exact).abs().max()))
            assert actual[index].shape == expected.shape and actual[index].dtype == expected.dtype
            assert_within_promise(actual[index], expected, exact)
        assert all(torch.equal(given[key], value) for key, value in kept.items())
        assert not vidkernels.status(block).fallbacks


def test_norms_of_diffusers() -> None:
    block, given = BasicTransformerBlock(RMSNorm).eval(), inputs(2)
    with torch.no_grad():
        expected = block(**given)
        torch.testing.assert_close(patched(block)(**given), expected, atol=1e-5, rtol=1e-4)
    assert not vidkernels.status(block).fallbacks


def gradients(block: nn.Module, given: dict[str, Any], checked: bool = False) -> dict[str, Tensor]:
    names = ("hidden_states", "embedded_timestep", "encoder_hidden_states")
    given = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    y: Any = checkpoint(lambda: block(**given), use_reentrant=False) if checked else block(**given)
    total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in y)
    wanted = {**{name: given[name] for name in names}, **dict(block.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


@pytest.mark.parametrize("name", ["dense", "layer norms", "padded groups"])
def test_gradients(name: str) -> None:
    block, given = ready(name), inputs(2)
    truth = gradients(copy.deepcopy(block).double(), cast(given, torch.float64))
    before, after = gradients(block, given), gradients(patched(block), given)
    scale = max(float(g.norm()) for g in truth.values())
    for key, exact in truth.items():
        errors = [float((g[key].double() - exact).norm()) for g in (before, after)]
        assert errors[1] <= 2 * errors[0] + GRADIENT_FLOOR * scale, (key, errors)
    again = gradients(block, given, checked=True)
    assert all(torch.equal(again[key], after[key]) for key in after)


def test_autocast_and_one_product_for_the_rows_of_all_blocks() -> None:
    block, given = ready("dense"), inputs(2)
    double, original = copy.deepcopy(block).double(), copy.deepcopy(block)
    with torch.no_grad():
        truth = double(**cast(given, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = original(**given), patched(block)(**given)
        for index in (0, 1):
            assert actual[index].dtype == expected[index].dtype
            assert_within_promise(actual[index], expected[index], truth[index])
        stack = nn.ModuleList([original, copy.deepcopy(original)])
        both = copy.deepcopy(stack)
        assert vidkernels.patch(both, batch_modulation=True)
        torch.testing.assert_close(both[1](**given), stack[1](**given), atol=1e-5, rtol=1e-4)


def first_and_copy(returned: Any) -> tuple[Tensor, Tensor]:
    first = returned[0] if isinstance(returned, tuple) else returned
    return first, first.clone()


@pytest.mark.parametrize("path", ["norm1", "norm2.norm_enc", "attn1", "attn1.norm_q", "attn1.to_k", "ff.net.0.proj"])
def test_hooks_fire_and_read_what_the_original_gave(path: str) -> None:
    block, given, seen = ready("dense"), inputs(2), list[tuple[Tensor, Tensor]]()
    with torch.no_grad():
        expected = block(**given)
        patched(block).get_submodule(path).register_forward_hook(lambda module, args, y: seen.append(first_and_copy(y)))
        if path.startswith("norm") or path == "attn1":
            with pytest.warns(VidkernelsFallbackWarning, match="hooks"):
                actual = block(**given)
        else:
            actual = block(**given)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1 and torch.equal(*seen[0])


def test_what_the_original_runs() -> None:
    block, given = patched(ready("dense")), inputs(2)
    with torch.no_grad():
        expected = copy.deepcopy(block)(**given)
        block.attn1.processor = type("Other", (OpenSoraAttnProcessor2_0,), {})(1, False)
        with pytest.warns(VidkernelsFallbackWarning, match="an attention uses Other"):
            torch.testing.assert_close(block(**given), expected, atol=1e-5, rtol=1e-4)
        one = {**given, "embedded_timestep": given["embedded_timestep"][:1]}  # for both samples
        with pytest.warns(VidkernelsFallbackWarning, match="an unusual input"):
            assert block(**one)[0].shape == expected[0].shape


def test_state_verify_and_undo() -> None:
    block, given = ready("padded groups"), inputs(2)
    state, expected = copy.deepcopy(block.state_dict()), block(**given)
    report = vidkernels.patch(block, verify=True)
    assert report.numerics and all(item.ok for item in report.numerics)
    assert all(torch.equal(block.state_dict()[key], value) for key, value in state.items())
    assert all(torch.equal(*pair) for pair in zip(copy.deepcopy(block)(**given), block(**given), strict=True))
    report.undo()
    assert type(block) is BasicTransformerBlock
    assert all(torch.equal(*pair) for pair in zip(block(**given), expected, strict=True))


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    block, given = patched(ready("every second")), inputs(2)
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given), block(**given), atol=2e-5, rtol=1e-4)
    torch._dynamo.reset()
