# SPDX-License-Identifier: Apache-2.0
"""Rules for blocks of HunyuanVideo's kind whose attention takes the text's mask: FastVideo's and HunyuanVideo 1.5's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import official_hunyuan_masked_toys as toys
import pytest
import test_patching_official_hunyuan as plain
import torch
from official_hunyuan_masked_toys import MLP, ModulateDiT, RMSNorm, apply_gate, apply_rotary_emb, modulate
from official_vae_suite import knowing
from patching_suite import cast, no_fallback  # noqa: F401
from torch import Tensor, nn

import vidkernels
from vidkernels.patching import digest
from vidkernels.patching.rules import _hunyuan_exact as exact
from vidkernels.patching.rules import _hunyuan_units as units
from vidkernels.patching.rules import official_hunyuan, official_hunyuan_masked

__all__ = ["MLP", "ModulateDiT", "RMSNorm", "apply_gate", "apply_rotary_emb", "modulate"]  # the home of the block below
_FAST = [rule for rule in official_hunyuan_masked.RULES if "fast" in rule.name]
_FINAL = [rule for rule in official_hunyuan.RULES if "final" in rule.name]


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    functions = [getattr(plain.toys, name) for name in plain._FUNCTIONS] + [RMSNorm.forward, RMSNorm._norm]
    monkeypatch.setattr(units, "FUNCTIONS", {digest(function) for function in functions})
    units._are_known.cache_clear()
    if "1_5" in request.function.__name__:
        yield from knowing(official_hunyuan_masked.RULES[:1], sys.modules[__name__])
    else:
        yield from knowing([*_FAST, *_FINAL], toys)
    units._are_known.cache_clear()


class TestFast(plain.TestFused):
    rules = {  # noqa: RUF012
        "test.hunyuan.fast_double_block": 1,
        "test.hunyuan.fast_single_block": 2,
        "test.hunyuan.final": 1,
    }
    # What they say of tables and of hooks is said of the same code.
    test_shapes_without_values = test_state_verify_and_undo = None  # type: ignore[assignment]

    def build(self, **changes: Any) -> Any:
        return toys.HYVideoDiffusionTransformer(**changes)

    def test_other_tables_are_used_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        upstream = toys.HYVideoDiffusionTransformer.tables
        monkeypatch.setattr(
            toys.HYVideoDiffusionTransformer, "tables", lambda self, grid: tuple(t * 0.5 for t in upstream(self, grid))
        )
        self.compare(self.ready(), self.inputs())

    def test_float64_copies_for_verify(self) -> None:
        model, arguments = self.ready().double(), cast(self.inputs(), torch.float64)
        with torch.no_grad():
            expected = model(**arguments)
            for block in [*model.double_blocks, *model.single_blocks]:
                exact.widen_masked(block)
            torch.testing.assert_close(model(**arguments), expected, atol=1e-12, rtol=1e-12)

    def test_a_strategy_is_handed_on(self) -> None:
        model, arguments = self.ready(), self.inputs()
        with torch.no_grad():
            before = model(**arguments)
            model.strategy = 3
            assert not torch.allclose(model(**arguments), before, atol=1e-3)
        self.compare(model, arguments)

    def test_each_process_turns_its_own_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(toys.nccl_info, "sp_size", 2)
            monkeypatch.setattr(toys.nccl_info, "rank_within_group", 1)
            arguments = cast(self.inputs(), dtype)
            arguments["img"] = arguments["img"][:, 6:]
            self.compare(self.ready().to(dtype), arguments)


def parallel_attention(*pairs: Any, attn_mode: Any, attn_param: Any, block_idx: Any, **told: Any) -> Tensor:
    mixed = toys.parallel_attention(*pairs, **told)
    return mixed if attn_mode == "flash" else mixed * attn_param / (1 + block_idx)


class MMDoubleStreamBlock(plain.toys.MMDoubleStreamBlock):
    """HunyuanVideo 1.5's: queries, keys and values by layers of their own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attn_mode = "torch"
        for kind in ("img", "txt"):
            delattr(self, f"{kind}_attn_qkv")
            for which in "qkv":
                setattr(self, f"{kind}_attn_{which}", nn.Linear(dim, dim))

    def split(self, kind: str, x: Tensor, rows: Any, first: Any, count: Any) -> list[Tensor]:
        parts = self._modules
        x = modulate(parts[f"{kind}_norm1"](x), rows[0], rows[1])
        q, k, v = (parts[f"{kind}_attn_{which}"](x).unflatten(2, (self.heads_num, -1)) for which in "qkv")
        return [parts[f"{kind}_attn_q_norm"](q), parts[f"{kind}_attn_k_norm"](k), v]

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any = None,
        text_mask: Any = None,
        attn_param: Any = None,
        is_flash: bool = False,
        block_idx: Any = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = img.shape[1]
        rows, none = self.rows(self.img_mod, vec, 6, None, None)
        text_rows, _ = self.rows(self.txt_mod, vec, 6, None, None)
        q, k, v = self.split("img", img, rows, none, None)
        if freqs_cis is not None:
            q, k = apply_rotary_emb(q, k, freqs_cis)
        pairs = zip((q, k, v), self.split("txt", txt, text_rows, none, None), strict=True)
        told = {"attn_mode": "flash" if is_flash else self.attn_mode, "attn_param": attn_param, "block_idx": block_idx}
        mixed = parallel_attention(*pairs, img_q_len=tokens, img_kv_len=tokens, text_mask=text_mask, **told)
        img = self.end("img", img, mixed[:, :tokens], rows, none, None)
        return img, self.end("txt", txt, mixed[:, tokens:], text_rows, none, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [{"is_flash": True}, {"attn_param": 2.0, "block_idx": 1}])
def test_block_of_1_5(dtype: torch.dtype, told: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = MMDoubleStreamBlock(64, 2).to(dtype)
    double = exact.widen_masked(copy.deepcopy(block)) if told.get("is_flash") else copy.deepcopy(block).double()
    streams = [torch.randn(2, tokens, 64, dtype=dtype) for tokens in (12, 5)]
    arguments = {"vec": torch.randn(2, 64, dtype=dtype), "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    arguments |= {"freqs_cis": plain.toys.rotary_tables((4, 14, 14), (1, 3, 4)), **told}
    with torch.no_grad():
        expected = block(*streams, **arguments)
        truth = double(*(x.double() for x in streams), **{**arguments, "vec": arguments["vec"].double()})
        report = vidkernels.patch(block)
        assert [entry.rule for entry in report.patched] == ["test.hunyuan.block_1_5"]
        for ours, theirs, exactly in zip(block(*streams, **arguments), expected, truth, strict=True):
            plain.assert_within_promise(ours, theirs, exactly)
    assert not vidkernels.status(block).fallbacks
