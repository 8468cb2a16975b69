# SPDX-License-Identifier: Apache-2.0
"""Other libraries' contestants compute what the case computes. cuDNN's node, which needs a device, is played by torch."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_adaln_zero, bench_qk_norm_rope, bench_varlen_attention, cudnn_adaln, verify
from benchmarks.registry import Case, Function
from benchmarks.runner import RIVAL_SLACK

CPU = torch.device("cpu")


def fault(case: Case, function: Function) -> str | None:
    """What the benchmark would say about a rival; its own error may be a few times ours (`loose`)."""
    actual = verify.evaluate(function, verify.make_inputs(case), bool(case.backward))
    return verify.fault(case, actual, verify.expect(case), RIVAL_SLACK)


def _node(kind: str, x: torch.Tensor, tensors: dict[int, torch.Tensor]) -> None:
    """What cuDNN documents for adaptive layer norm and its backward."""
    t = {uid: tensor.double() for uid, tensor in tensors.items()}
    if kind == "backward":
        normed, scaled = (
            (t[cudnn_adaln.X] - t[cudnn_adaln.MEAN]) * t[cudnn_adaln.RSTD],
            t[cudnn_adaln.DY] * t[cudnn_adaln.SCALE],
        )
        along = normed * (scaled * normed).mean(-1, keepdim=True)
        tensors[cudnn_adaln.DX].copy_(t[cudnn_adaln.RSTD] * (scaled - scaled.mean(-1, keepdim=True) - along))
        tensors[cudnn_adaln.DBIAS].copy_(t[cudnn_adaln.DY].sum(1, keepdim=True))
        tensors[cudnn_adaln.DSCALE].copy_((t[cudnn_adaln.DY] * normed).sum(1, keepdim=True))
        return
    mean = t[cudnn_adaln.X].mean(-1, keepdim=True)
    rstd = (t[cudnn_adaln.X].var(-1, keepdim=True, unbiased=False) + t[cudnn_adaln.EPSILON]).rsqrt()
    normed = (t[cudnn_adaln.X] - mean) * rstd
    tensors[cudnn_adaln.Y].copy_(normed * t[cudnn_adaln.SCALE] + t[cudnn_adaln.BIAS])
    if kind == "training":
        tensors[cudnn_adaln.MEAN].copy_(mean)
        tensors[cudnn_adaln.RSTD].copy_(rstd)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["modulate", "chain"])
def test_adaptive_layer_norm_of_cudnn(monkeypatch: pytest.MonkeyPatch, op: str, backward: bool) -> None:
    monkeypatch.setattr(cudnn_adaln, "_run", _node)
    case = bench_adaln_zero._case(CPU, op, (2, 24, 40), torch.bfloat16, backward, False)
    rival = cudnn_adaln.modulate if op == "modulate" else bench_adaln_zero._after_gate(cudnn_adaln.modulate)
    assert fault(case, rival) is None
    wrong = lambda i: rival({**i, "scale": i["scale"] + 8})  # noqa: E731
    assert fault(case, wrong) is not None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["head", "full"])
def test_rms_norm_and_rotation(norm: str, layout: str, backward: bool) -> None:
    case = bench_qk_norm_rope._case(CPU, 64, 3, torch.bfloat16, norm, backward, False, layout)
    assert case.peers
    for name, rival in case.peers.items():
        assert fault(case, rival) is None, name
    assert (
        verify.fault(case, verify.evaluate(case.ours, verify.make_inputs(case), backward), verify.expect(case)) is None
    )


@pytest.mark.parametrize("lengths", [[16] * 6, [5, 1, 30]])
def test_attention_of_segments(lengths: list[int]) -> None:
    case = bench_varlen_attention._case(CPU, "segments", lengths, 2, 16, torch.float32, True)
    assert ("SDPA of a batch" in case.peers) == (len(set(lengths)) == 1)
    for name, rival in case.peers.items():
        assert fault(case, rival) is None, name
