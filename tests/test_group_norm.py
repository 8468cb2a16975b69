# SPDX-License-Identifier: Apache-2.0
"""group_norm: against the reference and torch, per frame and per clip, any memory format."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_gradients_within_promise

from vidkernels import ops
from vidkernels._reference import channel_norm as reference
from vidkernels.errors import DTypeError, OptionError, ShapeError


@pytest.mark.parametrize("per_frame", [True, False], ids=["frame", "clip"])
@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format], ids=["NDHWC", "NCDHW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_keep_the_promise(
    per_frame: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x = (3 + torch.randn(2, 12, 3, 5, 7)).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(12).to(dtype), torch.randn(12).to(dtype)
    options = {"activation": "silu", "per_frame": per_frame}

    def run(module, backend=None):
        extra = {"backend": backend} if backend else {}
        return lambda x, w, b: module.group_norm(x, 4, w, b, **options, **extra)

    y = ops.group_norm(x, 4, weight, bias, **options)
    assert y.is_contiguous(memory_format=memory_format)
    assert_gradients_within_promise(run(ops), run(reference), (x, weight, bias), names=("x", "weight", "bias"))


def test_frames_are_independent_only_per_frame() -> None:
    x = torch.randn(1, 8, 4, 3, 3)
    changed = x.clone()
    changed[:, :, 2:] += 5
    assert torch.equal(
        ops.group_norm(x, 2, per_frame=True)[:, :, :2], ops.group_norm(changed, 2, per_frame=True)[:, :, :2]
    )
    assert not torch.allclose(ops.group_norm(x, 2)[:, :, :2], ops.group_norm(changed, 2)[:, :, :2])


def test_compile_empty_and_errors() -> None:
    x = torch.randn(2, 8, 3, 4, 4)
    compiled = torch.compile(
        lambda x: ops.group_norm(x, 4, per_frame=True, activation="silu"), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), ops.group_norm(x, 4, per_frame=True, activation="silu"))
    assert ops.group_norm(x[:0], 4).shape == (0, 8, 3, 4, 4)
    with pytest.raises(OptionError, match="num_groups: expected a divisor of the 8 channels"):
        ops.group_norm(x, 3)
    with pytest.raises(ShapeError, match="weight: expected"):
        ops.group_norm(x, 4, torch.ones(7))
    with pytest.raises(DTypeError, match="bias: expected the dtype of x"):
        ops.group_norm(x, 4, None, torch.ones(8).double())
    with pytest.raises(ShapeError, match="x: expected 5 dimensions"):
        ops.group_norm(x[0], 4)
