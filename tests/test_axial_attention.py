# SPDX-License-Identifier: Apache-2.0
"""Attention along an axis and packed attention with norm and rotation inside, composed and in one kernel."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradients_within_promise, opcheck

import vidkernels
from vidkernels import ops
from vidkernels._reference import axial_attention as reference
from vidkernels._reference import qk_norm_rope as rotary
from vidkernels.errors import BackendUnavailable, OptionError, ShapeError

# name: shape [..., H, D], dim, norm, rotated axes (None: no positions; "table": frequencies), causal
AXIAL = {
    "temporal": ((2, 5, 7, 2, 24), 1, "head", (24,), False),
    "temporal-72": ((1, 16, 3, 2, 72), 1, "head", (72,), False),
    "spatial-last": ((3, 11, 2, 16), 1, None, None, False),
    "rows-of-a-grid": ((2, 3, 4, 5, 2, 16), 3, None, (8, 6), True),
    "first-axis": ((6, 2, 3, 16), 0, "head", None, True),
    "one-sequence": ((9, 2, 20), 0, "head", (4, 4, 4), False),
    "frequencies": ((2, 6, 3, 2, 24), 1, "head", "table", False),
    "frequencies-72": ((1, 9, 2, 1, 72), 1, None, "table", False),
    "temporal-64": ((1, 16, 5, 1, 64), 1, None, None, False),
    "temporal-128": ((1, 9, 2, 1, 128), 1, "head", (44, 42, 42), True),
    "32-rows": ((1, 20, 3, 5, 16), 1, "head", (16,), True),
    "64-rows": ((1, 40, 2, 2, 16), 1, None, None, False),
    "one-token": ((2, 1, 3, 2, 16), 1, "head", (16,), False),
}
# name: lengths, H, D, norm, rotated axes, causal
PACKED = {
    "mixture": ([5, 7, 1, 0, 3, 9, 9], 3, 16, None, None, False),
    "norm-rotation": ([16, 2, 16, 30, 1], 2, 24, "head", (8, 8, 8), True),
    "frequencies": ([5, 12, 3], 2, 24, "head", "table", False),
    "head-72": ([5, 7, 1, 0, 0, 3, 9], 5, 72, "head", (24, 24, 24), False),
}


def angles(axes: Any, width: int, count: int) -> dict[str, Any]:
    """Rotated dimensions per axis, or a table whose pairs move with one axis, with several, or not at all."""
    if axes != "table":
        return {"axes": axes}
    table = torch.rand(count, width // 2 - 1)
    table[0, ::2], table[-1, 1::3] = 0.0, 0.0
    return {"frequencies": table}


def axial(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any], bool]:
    shape, dim, norm, axes, causal = AXIAL[name]
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    if norm is not None:
        tensors += [(torch.rand(shape[-1]) + 0.5).to(dtype) for _ in range(2)]
    options: dict[str, Any] = {"dim": dim, "norm": norm, "causal": causal}
    if axes is not None:
        places = torch.arange(shape[dim], dtype=torch.int32)
        count = 2 if axes == "table" else len(axes)
        options |= {"positions": torch.stack([places * (a + 1) for a in range(count)], 1), **angles(axes, shape[-1], 2)}
    return tensors, options, norm is not None


def packed(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any], bool]:
    lengths, heads, dim, norm, axes, causal = PACKED[name]
    tensors = [torch.randn(sum(lengths), heads, dim).to(dtype) for _ in range(3)]
    if norm is not None:
        tensors += [(torch.rand(dim) + 0.5).to(dtype) for _ in range(2)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "norm": norm, "causal": causal}
    if axes is not None:
        options |= {"positions": torch.randint(0, 40, (sum(lengths), 3), dtype=torch.int32), **angles(axes, dim, 3)}
    return tensors, options, norm is not None


def call(function: Any, options: dict[str, Any], weighted: bool, **more: Any) -> Any:
    def run(*x: torch.Tensor) -> torch.Tensor:
        weights = {"q_weight": x[3], "k_weight": x[4]} if weighted else {}
        return function(*x[:3], **options, **weights, **more)

    return run


def promise(op: Any, oracle: Any, made: tuple[list[torch.Tensor], dict[str, Any], bool], **more: Any) -> None:
    tensors, options, weighted = made
    longest = {"max_seqlen": 30} if "cu_seqlens" in options else {}
    names = ("q", "k", "v", "q_weight", "k_weight")[: len(tensors)]
    ours = call(op, options, weighted, **longest, **more)
    assert_gradients_within_promise(ours, call(oracle, options, weighted), tensors, names=names)


@pytest.mark.parametrize("name", AXIAL)
def test_reference_equals_transposed_sdpa(name: str) -> None:
    """The axis moved to the end, norm and rotation, PyTorch's attention, and back."""
    (q, k, v, *weights), options, _ = axial(name, torch.float64)
    weights = weights or [None, None]
    out = reference.axial_attention(q, k, v, q_weight=weights[0], k_weight=weights[1], **options)
    sides = [x.movedim(options["dim"], -3) for x in (q, k, v)]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in sides]
    turned = rotary.qk_norm_rope(
        *flat[:2],
        *weights,
        options.get("positions"),
        axes=options.get("axes"),
        frequencies=options.get("frequencies"),
        norm=options["norm"],
    )
    parts = (x.transpose(1, 2) for x in (*turned, flat[2]))
    expected = F.scaled_dot_product_attention(*parts, is_causal=options["causal"]).transpose(1, 2)
    torch.testing.assert_close(out, expected.reshape(sides[0].shape).movedim(-3, options["dim"]))
    assert out.is_contiguous()


@pytest.mark.parametrize("name", AXIAL)
def test_axial_composed(name: str) -> None:
    """The composition keeps the promise, with gradients of the weights."""
    promise(ops.axial_attention, reference.axial_attention, axial(name, torch.float32), backend="composed")


@pytest.mark.parametrize("name", AXIAL)
def test_axial_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that GPUs take where no tile holds a segment, which moves the axis instead of folding the others."""
    module = sys.modules["vidkernels.ops.axial_attention"]
    monkeypatch.setattr(module, "_compose_folded", module._compose_moved)
    promise(ops.axial_attention, reference.axial_attention, axial(name, torch.float32), backend="composed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["temporal", "spatial-last", "first-axis", "frequencies-72"])
def test_axial_reads_slices_of_one_projection(name: str, dtype: torch.dtype) -> None:
    """q, k and v with strides, forward and gradients."""

    def sliced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return ops.axial_attention(*torch.stack([q, k, v], -3).unbind(-3), *rest, **options)

    promise(sliced, reference.axial_attention, axial(name, dtype), backend="composed")


def test_axial_with_grouped_heads() -> None:
    """Query heads share key heads within each of the folded axes."""
    q, k, v = torch.randn(2, 5, 3, 4, 16), torch.randn(2, 5, 3, 2, 16), torch.randn(2, 5, 3, 2, 16)
    for causal in (True, False):
        made = ([q, k, v], {"dim": 1, "norm": "head", "causal": causal}, False)
        promise(ops.axial_attention, reference.axial_attention, made)
        strided = ([x.transpose(0, 2) for x in made[0]], *made[1:])
        promise(ops.axial_attention, reference.axial_attention, strided)


@pytest.mark.parametrize("name", PACKED)
def test_packed_composed(name: str) -> None:
    """The same for packed segments."""
    promise(ops.norm_rope_attention, reference.norm_rope_attention, packed(name, torch.float32), backend="composed")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", AXIAL)
def test_axial_kernel(name: str) -> None:
    """Several segments in one tile, norm and rotation inside, forward and backward."""
    promise(ops.axial_attention, reference.axial_attention, axial(name, torch.float32), backend="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", PACKED)
def test_packed_kernel(name: str) -> None:
    """Segments of any lengths, empty ones among them, each in exactly one tile."""
    promise(ops.norm_rope_attention, reference.norm_rope_attention, packed(name, torch.float32), backend="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_kernel_in_half_precision(dtype: torch.dtype) -> None:
    """q and k are rounded after the rotation as a pass of its own would round them."""
    promise(ops.axial_attention, reference.axial_attention, axial("temporal-72", dtype), backend="triton")
    promise(ops.norm_rope_attention, reference.norm_rope_attention, packed("head-72", dtype), backend="triton")


@pytest.mark.interpreter
def test_kernel_reads_strided_slices() -> None:
    """q, k, v as slices of one projection, an expanded cotangent, and gradients for v alone."""
    qkv = torch.randn(2, 5, 3, 3, 2, 16)
    q, k, v = qkv.unbind(3)
    out = ops.axial_attention(q, k, v, 1, backend="triton")
    torch.testing.assert_close(out, reference.axial_attention(q, k, v, 1), rtol=1e-5, atol=1e-6)
    leaf = v.contiguous().requires_grad_()
    (a,) = torch.autograd.grad(ops.axial_attention(q, k, leaf, 1, backend="triton").sum(), leaf)
    (b,) = torch.autograd.grad(reference.axial_attention(q, k, leaf, 1).sum(), leaf)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_nonfinite_values_stay_in_their_segment() -> None:
    """Segments share a tile, yet NaN or infinity in one changes no bit of the others."""
    for value in (float("nan"), float("inf")):
        for poisoned in range(3):
            tensors = [torch.randn(1, 4, 6, 2, 72) for _ in range(3)]
            clean = ops.axial_attention(*tensors, 1, norm="head", backend="triton")
            tensors[poisoned][0, 2, 3, 1, 70] = value
            out = ops.axial_attention(*tensors, 1, norm="head", backend="triton")
            touched = torch.zeros(1, 4, 6, 2, dtype=torch.bool)
            touched[0, :, 3, 1] = True
            assert torch.equal(out[~touched], clean[~touched])
            assert not bool(torch.isfinite(out[touched]).all())


@pytest.mark.interpreter
def test_bare_ops() -> None:
    """Schema and fake of the kernels' ops."""
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.zeros(9, 1, dtype=torch.int32)
    tail = (cu_seqlens, 5, torch.ones(16), torch.ones(16), positions, None, [16], [1e4], [1.0], True, 1e-6, False, 0.25)
    opcheck(torch.ops.vidkernels.short_attention_fwd_triton.default, (q, k, v, *tail))
    opcheck(torch.ops.vidkernels.short_attention_bwd_triton.default, (q, q, k, v, *tail))


def test_launches_of_other_tensors_are_told_apart() -> None:
    """A launch is repeated for tensors laid out alike, and not where one tensor stood for two."""
    pytest.importorskip("triton")
    from vidkernels.triton.short_attention import launch_key

    def key(*tensors: torch.Tensor, causal: bool = False, theta: float = 1e4) -> Any:
        found = launch_key((*tensors, None), "fwd", 0, [16], [theta], [1.0], False, 1e-6, causal, 0.25, None)
        return hash(found) and found

    q, k, v = torch.zeros(3, 2, 4, 3, 2, 16).unbind(0)
    assert key(q, k, v) == key(k, v, q)
    assert len({key(q, k, v), key(q, q, v), key(q, v, v), key(q, q, q), key(q.transpose(0, 2), k, v)}) == 5
    assert len({key(q, k, v), key(q, k, v, causal=True), key(q, k, v, theta=2.0), key(q.half(), k, v)}) == 4


def test_tile_limits_are_one_table() -> None:
    """The op refuses exactly the lengths that the launcher's tiles cannot hold."""
    pytest.importorskip("triton")
    from vidkernels.ops._short_attention import longest_segment
    from vidkernels.triton.short_attention import longest_short, short_config

    for family in ("sm_80", "sm_90", "sm_100", "amd"):
        for head_dim in range(1, 200):
            limit = longest_segment(head_dim, family)
            assert limit == longest_short(head_dim, family)
            if limit:
                assert limit <= short_config("fwd", head_dim, 8, family).block


@pytest.mark.parametrize("backend", ["composed", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_compiles_in_one_graph(backend: str) -> None:
    """fullgraph, forward and backward."""
    tensors, options, _ = axial("temporal", torch.float32)
    leaves = [x.requires_grad_() for x in tensors]

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return ops.axial_attention(*x[:3], q_weight=x[3], k_weight=x[4], backend=backend, **options).sin()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = [(y, *torch.autograd.grad(y.sum(), leaves)) for y in (compiled(*leaves), attend(*leaves))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_slices_of_one_projection_compile_with_symbolic_sizes() -> None:
    """PyTorch's kernel wants a bool for grouped heads, and got a comparison of symbolic sizes."""

    def attend(fused: torch.Tensor) -> torch.Tensor:
        q, k, v = fused.split([4, 2, 2], -2)
        return ops.axial_attention(q, k, v, 1)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 5, 3, 8, 16), (1, 6, 2, 8, 16)):
        fused = torch.randn(shape)
        torch.testing.assert_close(compiled(fused), attend(fused))


def test_empty_axes() -> None:
    """No places or no batch: an empty tensor of the right shape."""
    for shape in ((2, 0, 3, 2, 16), (0, 4, 3, 2, 16)):
        q = torch.zeros(shape)
        for backend in ("composed", "reference"):
            assert ops.axial_attention(q, q, q, 1, backend=backend).shape == shape


def test_errors_and_explanations() -> None:
    """Wrong arguments are named; refusals say why."""
    q = torch.zeros(2, 4, 3, 2, 16)
    positions = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(OptionError, match="^dim:"):
        ops.axial_attention(q, q, q, 3)
    with pytest.raises(ShapeError, match="^k:"):
        ops.axial_attention(q, q[:, :3], q, 1)
    with pytest.raises(ShapeError, match="^v:"):
        ops.axial_attention(q, q, q[..., :1, :], 1)
    with pytest.raises(ShapeError, match="^positions:"):
        ops.axial_attention(q, q, q, 1, positions=positions)
    with pytest.raises(OptionError, match="^norm:"):
        ops.axial_attention(q, q, q, 1, norm="full")
    with pytest.raises(BackendUnavailable, match="it runs on cuda tensors|exceed"):
        long = torch.zeros(1, 500, 1, 16)
        ops.axial_attention(long, long, long, 1, backend="triton")
    explanation = vidkernels.explain("axial_attention", q, q, q, 1)
    assert [choice.backend for choice in explanation.choices] == ["triton", "composed", "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_on_a_device(dtype: torch.dtype) -> None:
    """The compiled kernels keep the promise."""
    for names, make, op, oracle in (
        (AXIAL, axial, ops.axial_attention, reference.axial_attention),
        (PACKED, packed, ops.norm_rope_attention, reference.norm_rope_attention),
    ):
        for name in names:
            tensors, options, weighted = make(name, dtype)
            moved = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
            promise(op, oracle, ([x.cuda() for x in tensors], moved, weighted), backend="triton")
