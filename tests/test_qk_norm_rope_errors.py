# SPDX-License-Identifier: Apache-2.0
"""ops.qk_norm_rope: every wrong argument gets its typed error, which says argument, expected, got and remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from vidkernels import errors, ops

Q = torch.randn(4, 2, 8)
GRID = torch.zeros(4, 3)
HALF_GRID = GRID.bfloat16()
TABLE = torch.ones(3, 3)
LEARNED = torch.randn(4, 2, 8, requires_grad=True)

# name: (error, start of its text, positional arguments, options)
CASES: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "q not floating": (errors.DTypeError, "q: expected float32", (Q.int(), Q), {}),
    "q not a tensor": (errors.DTypeError, "q: expected a torch.Tensor, got list", ([1.0], Q), {}),
    "q two dimensions": (errors.ShapeError, "q: expected 3 to 4 dimensions", (Q[0], Q), {}),
    "q no channels": (errors.ShapeError, "q: expected a head dimension", (Q[..., :0], None), {}),
    "k other dtype": (errors.DTypeError, "k: expected the dtype of q", (Q, Q.double()), {}),
    "k other tokens": (errors.ShapeError, "k: expected ", (Q, Q[1:]), {}),
    "k other device": (errors.DeviceError, "k: expected the device of q", (Q, Q.to("meta")), {}),
    "norm": (errors.OptionError, "norm: expected one of None, 'head', 'full'", (Q, Q), {"norm": "layer"}),
    "layout": (errors.OptionError, "layout: expected one of 'interleaved'", (Q, Q), {"layout": "pairs"}),
    "weight shape": (errors.ShapeError, "q_weight: expected shape (8,)", (Q, Q, torch.ones(16)), {}),
    "full weight shape": (errors.ShapeError, "q_weight: expected shape (16,)", (Q, Q, torch.ones(8)), {"norm": "full"}),
    "weight, no norm": (errors.OptionError, "q_weight: expected None with", (Q, Q, torch.ones(8)), {"norm": None}),
    "weight, no k": (errors.OptionError, "k_weight: expected None without k", (Q, None, None, torch.ones(8)), {}),
    "positions dtype": (errors.DTypeError, "positions: expected int32", (Q, Q), {"positions": HALF_GRID}),
    "positions tokens": (errors.ShapeError, "positions: expected [4, 'A']", (Q, Q), {"positions": torch.zeros(5, 3)}),
    "positions axes": (errors.ShapeError, "positions: expected", (Q, Q), {"positions": torch.zeros(4, 4)}),
    "axes odd": (errors.OptionError, "axes: expected 3 even", (Q, Q), {"positions": GRID, "axes": (1, 3, 4)}),
    "axes count": (errors.OptionError, "axes: expected 3 even", (Q, Q), {"positions": GRID, "axes": (4, 4)}),
    "axes too many": (errors.OptionError, "axes: expected at most 8", (Q, Q), {"positions": GRID, "axes": (4, 4, 4)}),
    "theta count": (errors.OptionError, "theta: expected one number", (Q, Q), {"positions": GRID, "theta": (1e4, 1e4)}),
    "theta negative": (errors.OptionError, "theta: expected positive", (Q, Q), {"positions": GRID, "theta": -1.0}),
    "table and axes": (
        errors.OptionError, "frequencies: expected no axes", (Q, Q), {"positions": GRID, "axes": (2, 2, 2), "frequencies": TABLE},
    ),
    "table and theta": (
        errors.OptionError, "frequencies: expected no axes", (Q, Q), {"positions": GRID, "theta": 256.0, "frequencies": TABLE},
    ),
    "table axes": (
        errors.ShapeError, "frequencies: expected size 3", (Q, Q), {"positions": GRID, "frequencies": TABLE[:2]},
    ),
    "table heads": (
        errors.ShapeError, "frequencies: expected one table per head of q", (Q, Q), {"positions": GRID, "frequencies": torch.ones(3, 5, 3)},
    ),
    "table and axis_half": (
        errors.OptionError, "layout: expected 'interleaved'", (Q, Q), {"positions": GRID, "frequencies": TABLE, "layout": "axis_half"},
    ),
    "inplace, gradients": (errors.OptionError, "inplace: expected False while", (LEARNED, Q), {"inplace": True}),
    "unknown backend": (errors.OptionError, "backend: expected one of auto, cpp", (Q, Q), {"backend": "cudnn"}),
    "backend elsewhere": (errors.BackendUnavailable, "qk_norm_rope: backend 'cuda' cannot", (Q, Q), {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_errors(name: str) -> None:
    """The error's type and text, and no write to q."""
    kind, text, arguments, options = CASES[name]
    before = Q.clone()
    with pytest.raises(kind, match="^" + re.escape(text)):
        ops.qk_norm_rope(*arguments, **options)
    assert torch.equal(Q, before)
