# SPDX-License-Identifier: Apache-2.0
"""Calls of other libraries' attention, against stand-ins with their public signatures that compute with PyTorch: a wrong
keyword, a wrong order or a wrong unit is found without a GPU. Whether the libraries themselves are right is not."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradients_within_promise
from test_varlen_attention import offsets

from vidkernels import ops
from vidkernels._reference import varlen_attention as reference
from vidkernels.ops import _attention_cudnn, _attention_engines, varlen_attention

BACKENDS = inspect.getmodule(varlen_attention).BACKENDS
# lengths of q, lengths of k (None: self-attention), Hq, Hk, causal
CASES = {
    "self": ([7, 1, 12], None, 2, 2, False),
    "causal": ([7, 1, 12], None, 2, 2, True),
    "cross-grouped": ([5, 3], [9, 4], 4, 2, False),
    "cross-causal": ([5, 3], [9, 4], 2, 2, True),
}


def attend(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, causal: bool, scale: float) -> torch.Tensor:
    """Segment by segment with an explicit mask, aligned at the end."""
    parts = []
    for i in range(len(starts_q) - 1):
        rows, columns = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        operands = [x.transpose(0, 1) for x in (q[rows], k[columns], v[columns])]
        length_q, length_k = operands[0].shape[1], operands[1].shape[1]
        mask = torch.ones(length_q, length_k, dtype=torch.bool)
        mask = mask.tril(length_k - length_q) if causal else mask
        out = F.scaled_dot_product_attention(*operands, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def flash2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn 2.8."""
    check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert dropout_p == 0.0 and deterministic
    return attend(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), causal, softmax_scale)


def flash3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_interface of hopper/."""
    check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert deterministic and seqused_q is None and qv is None
    return attend(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), causal, softmax_scale)


def flash4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
    page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None, block_sparse_tensors=None,
    cu_total_m_blocks=None, cu_total_n_blocks=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    """flash_attn.cute 4.0 beta: returns (out, lse)."""
    check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert deterministic and seqused_q is None and page_table is None
    return attend(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), causal, softmax_scale), None


def early_flash4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    """Its first betas took neither lengths nor `deterministic`."""
    return attend(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), causal, softmax_scale), None


def check(cu_seqlens_q: Any, cu_seqlens_k: Any, max_q: Any, max_k: Any) -> None:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_q == int(cu_seqlens_q.diff().max()) and max_k == int(cu_seqlens_k.diff().max())


def torch_varlen(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Binds to the installed torch's own signature."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    bound = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    check(a["cu_seq_q"], a["cu_seq_k"], a["max_q"], a["max_k"])
    causal = a.get("is_causal", False) or tuple(a.get("window_size", (-1, -1))) == (-1, 0)
    assert a.get("enable_gqa", True) or a["query"].shape[1] == a["key"].shape[1]
    starts = a["cu_seq_q"].tolist(), a["cu_seq_k"].tolist()
    return attend(a["query"], a["key"], a["value"], *starts, causal, a["scale"])


STAND_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    "flash2": ("flash2", flash2),
    "flash3": ("flash3", flash3),
    "flash4": ("flash4", flash4),
    "early-flash4": ("flash4", early_flash4),
    "torch": ("torch", torch_varlen),
}


def promise(engine: str, case: str) -> None:
    lengths_q, lengths_k, heads_q, heads_k, causal = CASES[case]
    total_k = sum(lengths_q if lengths_k is None else lengths_k)
    tensors = [torch.randn(sum(lengths_q), heads_q, 16)] + [torch.randn(total_k, heads_k, 16) for _ in "kv"]
    keys = None if lengths_k is None else offsets(lengths_k)
    call = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": keys, "causal": causal, "scale": 0.3}
    assert_gradients_within_promise(
        lambda *x: ops.varlen_attention(*x, **call, deterministic=True, backend=engine),
        lambda *x: reference.varlen_attention(*x, **call),
        tensors,
        names=("q", "k", "v"),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STAND_INS)
def test_arguments_of_functions(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument arrives under its public name, with its meaning."""
    engine, function = STAND_INS[name]
    signature = function
    if function is torch_varlen:
        signature = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    monkeypatch.setitem(_attention_engines._FUNCTIONS, engine, (function, None))
    monkeypatch.setitem(_attention_engines._PARAMETERS, engine, frozenset(inspect.signature(signature).parameters))
    monkeypatch.setitem(BACKENDS.backends, engine, lambda *facts: None)
    promise(engine, case)


class Node:
    """A tensor of the stand-in graph."""

    def __init__(self, uid: int | None = None, dim: Any = None, stride: Any = None, data_type: Any = None) -> None:
        self.uid, self.dim, self.stride, self.data_type, self.offset, self.output = (
            uid,
            dim,
            stride,
            data_type,
            None,
            False,
        )

    def _set(self, **values: Any) -> Node:
        self.__dict__.update(values)
        return self

    def set_uid(self, uid: int) -> Node:
        return self._set(uid=uid)

    def set_dim(self, dim: list[int]) -> Node:
        return self._set(dim=dim)

    def set_stride(self, stride: list[int]) -> Node:
        return self._set(stride=stride)

    def set_data_type(self, data_type: Any) -> Node:
        return self._set(data_type=data_type)

    def set_output(self, output: bool) -> Node:
        return self._set(output=output)

    def set_ragged_offset(self, offset: Node) -> Node:
        return self._set(offset=offset)


class Graph:
    """`cudnn.pygraph` as its documentation has it: tensors [B, H, S, D] at ragged offsets in elements."""

    def __init__(self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, handle: Any) -> None:
        self.built = False

    def tensor(self, *, dim: list[int], stride: list[int], data_type: Any, uid: int) -> Node:
        assert len(dim) == len(stride) == 4
        return Node(uid, dim, stride, data_type)

    def sdpa(
        self, *, q, k, v, attn_scale, use_padding_mask, seq_len_q, seq_len_kv, generate_stats,
        diagonal_alignment="top_left", diagonal_band_right_bound=None,
    ):  # fmt: skip
        assert use_padding_mask and diagonal_band_right_bound in (None, 0)
        self.causal, self.align, self.scale = diagonal_band_right_bound == 0, diagonal_alignment, attn_scale
        self.inputs, self.lengths = [q, k, v], (seq_len_q, seq_len_kv)
        self.outputs = [Node()]
        return self.outputs[0], Node() if generate_stats else None

    def sdpa_backward(self, *, q, k, v, o, dO, stats, use_deterministic_algorithm, **options):
        assert use_deterministic_algorithm and stats.dim[:3] == q.dim[:3] and o.dim == q.dim
        self.sdpa(q=q, k=k, v=v, generate_stats=False, **options)
        self.grad, self.outputs = dO, [Node(), Node(), Node()]
        return self.outputs

    def build(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"] and all(n.output and n.offset is not None for n in self.outputs)
        self.built = True

    def get_workspace_size(self) -> int:
        return 32

    def rows(self, node: Node, pack: dict[int, torch.Tensor], i: int, length: int) -> torch.Tensor:
        base, starts = pack[node.uid], pack[node.offset.uid]
        assert starts.shape[0] == node.dim[0] + 1 and length <= node.dim[2]
        return torch.as_strided(
            base, (node.dim[1], length, node.dim[3]), node.stride[1:], base.storage_offset() + int(starts[i])
        )

    def execute(self, pack: dict[int, torch.Tensor], workspace: torch.Tensor, *, handle: Any) -> None:
        assert self.built and workspace.numel() >= 32
        for i in range(self.inputs[0].dim[0]):
            length_q, length_k = (int(pack[n.uid][i]) for n in self.lengths)
            lengths = (length_q, length_k, length_k)
            leaves = [
                self.rows(n, pack, i, m).detach().clone().requires_grad_()
                for n, m in zip(self.inputs, lengths, strict=True)
            ]
            mask = torch.ones(length_q, length_k, dtype=torch.bool)
            if self.causal:
                mask = mask.tril(length_k - length_q if self.align == "bottom_right" else 0)
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=self.scale, enable_gqa=True)
            if len(self.outputs) == 1:
                self.rows(self.outputs[0], pack, i, length_q).copy_(out.detach())
                continue
            for n, m, g in zip(
                self.outputs,
                lengths,
                torch.autograd.grad(out, leaves, self.rows(self.grad, pack, i, length_q)),
                strict=True,
            ):
                self.rows(n, pack, i, m).copy_(g)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: name for name in ("HALF", "BFLOAT16", "FLOAT", "INT32", "INT64")}
    module = types.ModuleType("cudnn")
    module.pygraph, module.data_type = Graph, types.SimpleNamespace(**names)
    module.diagonal_alignment = types.SimpleNamespace(TOP_LEFT="top_left", BOTTOM_RIGHT="bottom_right")
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    monkeypatch.setitem(__import__("sys").modules, "cudnn", module)
    monkeypatch.setattr("vidkernels.cudnn.thread_handle", lambda device: object())
    monkeypatch.setitem(BACKENDS.backends, "cudnn", lambda *facts: None)
    _attention_cudnn._plan.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_graphs_of_cudnn(case: str, cudnn: None) -> None:
    """Offsets, lengths, strides and masks of the forward and the backward graph."""
    promise("cudnn", case)


def test_cudnn_reads_slices_and_keeps_its_graphs(cudnn: None) -> None:
    """Slices of one projection at their own strides; other lengths of the same rounded maxima build nothing new."""
    for lengths in ([7, 1, 12], [4, 9, 20]):
        q, k, v = torch.randn(sum(lengths), 3, 2, 16).unbind(1)
        out = ops.varlen_attention(q, k, v, offsets(lengths), backend="cudnn")
        torch.testing.assert_close(out, reference.varlen_attention(q, k, v, offsets(lengths)), rtol=1e-5, atol=1e-6)
    assert _attention_cudnn._plan.cache_info().misses == 1


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever it raises: the import of vidkernels survives it, and says why the engine does not serve."""
    (tmp_path / "flash_attn_of_another_gpu.py").write_text("raise KeyError('sm_999')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    function, reason = _attention_engines._load("flash_attn_of_another_gpu", "flash_attn_varlen_func")
    assert function is None and reason is not None
    assert reason.endswith("cannot be imported: KeyError: 'sm_999'")


@pytest.mark.parametrize("longest", [_attention_engines.SHORT, 4096])
@pytest.mark.parametrize("major", [8, 9, 10])
def test_engines_come_before_the_reference(major: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short segments, where the Triton kernels lead, included: Triton may be missing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(_attention_engines._measured, "order", lambda *call: None)
    q = SimpleNamespace(device=torch.device("cuda"), shape=(8192, 2, 64), dtype=torch.bfloat16)
    names = _attention_engines.rank(q, q, q, longest, longest)
    assert {"triton", "flash2", "torch"} <= set(names[: names.index("reference")])
    assert (names[0] == "triton-short") == (longest == _attention_engines.SHORT)


@pytest.mark.parametrize(
    ("major", "head", "served"), [(9, 256, True), (10, 128, True), (10, 136, False), (10, 256, False), (12, 192, False)]
)
def test_flash4_is_not_asked_for_heads_that_it_refuses(
    major: int, head: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises beyond 128 on GPUs after sm_90 (but for 256 in some versions), where the next engine should serve."""
    monkeypatch.setattr(_attention_engines, "capability", lambda device: (major, 0))
    monkeypatch.setitem(_attention_engines._FUNCTIONS, "flash4", (flash4, None))
    parameters = frozenset(inspect.signature(flash4).parameters) | {"deterministic"}
    monkeypatch.setitem(_attention_engines._PARAMETERS, "flash4", parameters)
    q = SimpleNamespace(device=torch.device("cuda"), shape=(8192, 2, head), dtype=torch.bfloat16)
    reason = _attention_engines._flash4(q, q, q, 4096, 4096, False, True, False)
    assert reason is None if served else reason is not None and "128" in reason
