# SPDX-License-Identifier: Apache-2.0
"""What a language model over a tokenizer's tokens (VideoPoet, arXiv 2312.14125) asks of this package: attention that sees a
condition whole and its own output causally, and MAGVIT-v2's tokens of clips and images."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_gradients_within_promise
from torch import Tensor

from vidkernels import ops
from vidkernels.models.tokenizers import MAGVIT2, MAGVIT2Config

PREFIXES, OUTPUTS = [5, 0, 33, 64, 1], [7, 9, 0, 70, 1]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def samples(prefix: Tensor, output: Tensor) -> list[Tensor]:
    """Each sample's condition and output, one after the other."""
    pairs = zip(prefix.split(PREFIXES), output.split(OUTPUTS), strict=True)
    return [torch.cat(pair) for pair in pairs]


def by_two_calls(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    q_prefix, k_prefix, v_prefix, q_output, k_output, v_output = tensors
    k, v = torch.cat(samples(k_prefix, k_output)), torch.cat(samples(v_prefix, v_output))
    both = offsets([a + b for a, b in zip(PREFIXES, OUTPUTS, strict=True)])
    prefix = ops.varlen_attention(q_prefix, k_prefix, v_prefix, offsets(PREFIXES))
    return prefix, ops.varlen_attention(q_output, k, v, offsets(OUTPUTS), both, causal=True)


def by_masks(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: a token sees the condition, and of the output what is not behind itself."""
    q, k, v = (samples(tensors[i], tensors[i + 3]) for i in range(3))
    prefixes, outputs = [], []
    for i, length in enumerate(PREFIXES):
        scores = torch.einsum("qhd,khd->hqk", q[i], k[i]) * q[i].shape[2] ** -0.5
        at = torch.arange(q[i].shape[0])
        seen = (at[None, :] < length) | ((at[:, None] >= length) & (at[None, :] <= at[:, None]))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        result = torch.einsum("hqk,khd->qhd", weights, v[i])
        prefixes.append(result[:length])
        outputs.append(result[length:])
    return torch.cat(prefixes), torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_condition_whole_and_output_causal(dtype: torch.dtype) -> None:
    rows = [sum(PREFIXES)] * 3 + [sum(OUTPUTS)] * 3
    tensors = [torch.randn(count, 2, 40).to(dtype) for count in rows]
    names = [f"{name} of the {part}" for part in ("condition", "output") for name in "qkv"]
    assert_gradients_within_promise(by_two_calls, by_masks, tensors, names=names)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((17, 128, 128), (5, 16, 16)), ((17, 224, 128), (5, 28, 16)), ((1, 128, 128), (1, 16, 16))],
    ids=["1280 of a clip", "2240 of a tall one", "256 of an image"],
)
def test_tokens_of_clips_and_images(size: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    """The published model's grid (here with few channels), and its tokens as two of 2^9 codes."""
    model = MAGVIT2(MAGVIT2Config(channels=32, channel_multipliers=(1, 1, 1, 1), residual_blocks=1)).eval()
    with torch.no_grad():
        codes, tokens = model.encode(torch.rand(1, 3, *size) * 2 - 1)
    assert tokens.shape == (1, *grid)
    bits = (codes > 0).long()
    low, high = ((half << torch.arange(9).view(9, 1, 1, 1)).sum(1) for half in bits.split(9, dim=1))
    assert torch.equal(tokens & 511, low) and torch.equal(tokens >> 9, high)
