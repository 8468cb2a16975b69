# SPDX-License-Identifier: Apache-2.0
"""What inference of residual blocks rests on: a convolution that writes to a given tensor, and blocks in pieces."""

from __future__ import annotations

import pytest
import torch
from helpers import Ops
from torch._subclasses.fake_tensor import FakeTensorMode

from vidkernels import ops
from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.models.tokenizers._vidtok_layers import FrameBlock, TimeBlock
from vidkernels.nn import _residual

BACKENDS = ("cpp", "torch", "reference")
KERNELS = ((1, 3, 3), (3, 1, 1), (3, 3, 3), (1, 1, 1))


def clip(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(
        dtype, memory_format=torch.channels_last_3d
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_convolution_adds_to_its_residual_in_place(backend: str, kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    x, stream = clip(2, 16, 4, 12, 10, dtype=dtype), clip(2, 24, 4, 12, 11, dtype=dtype)
    weight, bias = torch.randn(24, 16, *kernel, dtype=dtype) / 8, torch.randn(24, dtype=dtype)
    part = stream[..., 1:]  # a view: frames and rows apart, channels together
    expected = ops.causal_conv3d(x, weight, bias, residual=part, backend=backend)
    border = stream[..., :1].clone()
    result = ops.causal_conv3d(x, weight, bias, residual=part, out=part, backend=backend)
    assert result.data_ptr() == part.data_ptr() and torch.equal(part, expected)
    assert torch.equal(stream[..., :1], border)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_out_takes_any_layout_history_activation_and_nothing(backend: str) -> None:
    x, weight = clip(1, 16, 3, 12, 12), torch.randn(16, 16, 3, 3, 3) / 12
    options = {"history": clip(1, 16, 2, 12, 12), "activation": "silu", "return_history": True, "backend": backend}
    expected, history = ops.causal_conv3d(x, weight, **options)
    out = torch.full((1, 3, 16, 12, 12), float("nan")).transpose(1, 2)  # channels far apart
    y, after = ops.causal_conv3d(x, weight, out=out, **options)
    assert y is out and torch.equal(out, expected) and torch.equal(after, history)
    assert ops.causal_conv3d(x[:0], weight, out=x[:0].clone(), backend=backend).shape == (0, 16, 3, 12, 12)


def test_what_cannot_receive_a_result_is_refused() -> None:
    x, weight = clip(1, 4, 2, 4, 4), torch.randn(4, 4, 1, 3, 3)
    for out, error, match in (
        (x.new_empty(1, 4, 2, 4, 5), ShapeError, "out: expected .* shape of the result"),
        (x.bfloat16(), DTypeError, "out"),
        ([x], OptionError, "out"),
    ):
        with pytest.raises((error, TypeError), match=match):
            ops.causal_conv3d(x, weight, out=out)
    with pytest.raises(OptionError, match="out: expected no gradients"):
        ops.causal_conv3d(x, weight.requires_grad_(), out=x.clone())


@pytest.mark.parametrize("limit", [1, 2000, 1 << 30])
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_pieces_of_several_clips_are_the_whole(limit: int, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residual, "PIECE_CPU", limit)
    wider, frames, times = FrameBlock(16, 32), FrameBlock(16, 16), TimeBlock(16, (3,), "replicate")
    torch.nn.init.normal_(times.conv2.conv.weight, std=0.1)
    x = clip(3, 16, 2, 11, 12)
    for block in (wider, frames, times):
        with torch.enable_grad():
            expected = block(x)  # gradients are needed: computed as a whole
        given = x.clone(memory_format=torch.channels_last_3d)
        result = block(given, None, inplace)
        assert torch.equal(result, expected)
        assert (result.data_ptr() == given.data_ptr()) == (inplace and block is not wider)
        assert inplace or torch.equal(given, x)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("size", "most"), [(20, 8), (256, 204), (7, 7), (7, 1), (5, 3), (1, 4)])
@torch.no_grad()
def test_pieces_are_few_and_alike(dim: int, size: int, most: int) -> None:
    shape = (1, 4, size, 3, 2) if dim == 2 else (1, 4, 3, size, 2)
    x, starts, lengths = clip(*shape), [], []

    def branch(piece: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        lengths.append(piece.shape[dim])
        starts.append(piece.storage_offset())
        return piece + 1 if out is None else torch.add(piece, 1, out=out)

    result = _residual.in_pieces(branch, x, dim, 4, limit=most * x.numel() // size)
    assert torch.equal(result, x + 1)
    assert len(lengths) == -(-size // most) and sum(lengths) == size and len(set(starts)) == len(starts)
    assert max(lengths) <= most and min(lengths) > 0 and max(lengths) - min(lengths) <= 1


def _called(block: torch.nn.Module, x: torch.Tensor) -> list[str]:
    with Ops() as found:
        block(x, None, True)
    return found.names


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake tensors of a GPU are copied by torch with CUDA")
@torch.no_grad()
def test_pieces_on_a_gpu_cost_no_ops_but_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors of a GPU, which `memory_estimate` uses as well: norm, convolution, norm, convolution for each piece."""
    with FakeTensorMode():
        x = torch.empty(1, 16, 5, 8, 8, device="cuda", memory_format=torch.channels_last_3d)
        blocks = FrameBlock(16, 16), TimeBlock(16, (3,), "zeros"), FrameBlock(16, 32)
        for block, extra in zip(blocks, (0, 0, 1), strict=True):
            for module in block.modules():
                for name, weight in list(module._parameters.items()):
                    module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, device="cuda"))
            monkeypatch.setattr(_residual, "PIECE_GPU", 1 << 30)
            whole = _called(block, x)
            monkeypatch.setattr(_residual, "PIECE_GPU", x.numel() * (2 if extra else 1) * 3 // 5)
            pieces = _called(block, x)
            kernels = [name for name in whole if name.startswith(("causal_conv3d", "channel_norm"))]
            assert len(kernels) == 4 + extra
            assert [name for name in pieces if name.startswith(("causal_conv3d", "channel_norm"))] == kernels * 2


class _Tokens(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = FrameBlock(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.fsq_quantize(self.block(x)[:, :3], (7, 6, 5), dim=1)[0]


@torch.no_grad()
def test_export_takes_batches_of_any_size_before_any_eager_call() -> None:
    model, batch = _Tokens(), torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (clip(2, 16, 3, 8, 8),), dynamic_shapes=({0: batch},)).module()
    for size in (5, 64):  # beyond the other sizes as well: none is compared with another
        x = clip(size, 16, 3, 8, 8)
        torch.testing.assert_close(exported(x), model(x))
