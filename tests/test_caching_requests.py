# SPDX-License-Identifier: Apache-2.0
"""Several requests in one batch with schedules of their own: each as if it were alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from caching_toys import FAMILIES, diffusers_model, latte, traced_model
from torch import Tensor, nn

from vidkernels.caching import CacheHandle, _to_host, adacache
from vidkernels.caching._requests import Members, join, merge, select, split
from vidkernels.caching.policies import FirstBlockPolicy
from vidkernels.errors import OptionError, ShapeError

STEPS = 12


def sample(model: nn.Module, requests: list[int], branches: int = 2, calls: int = 1) -> Tensor:
    """Predictions of all steps; request i drifts at a pace of its own, so that schedules differ."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 4, 8, 8, generator=generator)[requests]
    away = torch.randn(4, 4, 4, 8, 8, generator=generator)[requests]
    pace = torch.tensor([0.0, 0.05, 0.4, 2.0])[requests]
    outputs = []
    with torch.inference_mode():
        for step in range(STEPS):
            moved = x + (pace * (0.3 if step % 3 else 1.0) * step)[:, None, None, None, None] * away
            rows = torch.cat([moved + branch for branch in range(branches)])
            t = torch.full((len(rows),), 900.0 - 20 * step)
            parts = [model(part, time) for part, time in zip(rows.chunk(calls), t.chunk(calls), strict=True)]
            outputs.append(torch.cat(parts).unflatten(0, (branches, -1)))
    return torch.stack(outputs)


OPTIONS = {"codebook": ((0.02, 5), (0.08, 3), (0.2, 2), (1.0, 1)), "motion_window": (3, 9), "motion_scale": 1.0}


@pytest.mark.parametrize("calls", [1, 2])
def test_each_request_is_as_alone(calls: int) -> None:
    model, requests = latte(), [0, 1, 2, 3]
    alone = []
    for request in requests:
        with adacache(model, STEPS, calls_per_step=calls, **OPTIONS) as handle:
            outputs = sample(model, [request], calls=calls)
            alone.append((outputs, handle.report()))
    assert len({report.computed_steps for _, report in alone}) > 2
    ran = [0]
    with adacache(model, STEPS, calls_per_step=calls, requests=4, **OPTIONS) as handle:
        model.blocks[0].register_forward_hook(lambda module, args, output: ran.__setitem__(0, ran[0] + len(args[0])))
        outputs = sample(model, requests, calls=calls)
        reports = [handle.report(request) for request in requests]
    for request, (expected, report) in enumerate(alone):
        assert reports[request].computed_steps == report.computed_steps
        torch.testing.assert_close(
            torch.tensor(reports[request].distances), torch.tensor(report.distances), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(outputs[:, :, request], expected[:, :, 0], rtol=1e-4, atol=1e-5)
    # Rows that ran are those of the requests that computed, no others.
    assert ran[0] == 2 * sum(len(report.computed_steps) for report in reports)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_models_split_by_request(family: str) -> None:
    """Every argument that has rows is split, every output class is put together again."""
    model, run = diffusers_model(family, pytest.importorskip("diffusers"))
    plain = [run(step) for step in range(6)]
    with adacache(model, 6, requests=2, codebook=((1e9, 2),)) as handle:
        cached = [run(step) for step in range(6)]
        assert [handle.report(i).computed_steps for i in range(2)] == [(1, 2, 4, 5, 6)] * 2
    for step in (0, 1, 3, 4, 5):
        torch.testing.assert_close(cached[step], plain[step], rtol=1e-5, atol=1e-6)
    with adacache(model, 6, requests=2, codebook=((1e9, 1),)) as handle:
        run(0)
        handle._policies[1].rate = 3  # the second request skips steps 2 and 3
        mixed = [run(step) for step in (1, 2)]
        assert [handle.report(i).computed_steps for i in range(2)] == [(1, 2, 3), (1,)]
    for step, output in enumerate(mixed, 1):
        torch.testing.assert_close(output[0], plain[step][0], rtol=1e-5, atol=1e-6)
        assert not torch.equal(output[1], plain[step][1])
    assert torch.equal(run(0), plain[0])


def test_captions_masks_and_frames_of_stdit3() -> None:
    """Caption masks have one row per request, not per branch."""
    model = traced_model()
    x, y = torch.randn(4, 4, 5, 8, 12), torch.randn(4, 1, 20, 32)
    mask = torch.ones(2, 20)
    mask[1, 7:] = 0
    size = {"fps": torch.tensor([24.0]), "height": torch.tensor([64.0]), "width": torch.tensor([96.0])}

    @torch.inference_mode()
    def run(step: int) -> Tensor:
        return model(x, torch.full((4,), 900.0 - step), y, mask, x_mask=torch.ones(4, 5, dtype=torch.bool), **size)

    plain = [run(step) for step in range(4)]
    with adacache(model, 4, requests=2, codebook=((1e9, 1),)) as handle:
        run(0)
        handle._policies[0].rate = 5
        mixed = run(1)
    # Another batch size rounds otherwise; outputs reach 5.
    torch.testing.assert_close(mixed[[1, 3]], plain[1][[1, 3]], rtol=1e-5, atol=1e-5)
    assert not torch.equal(mixed[[0, 2]], plain[1][[0, 2]])


def test_split_and_join_are_inverse() -> None:
    members = Members((0, 2, 3), branches=2, total=4)
    x = torch.randn(2 * 3 * 5, 7)
    parts = split(x, members)
    assert [part.shape for part in parts] == [(10, 7)] * 3
    assert torch.equal(join(parts, members), x)
    assert torch.equal(parts[1], torch.cat([x[5:10], x[20:25]]))
    assert split(x, Members((0,)))[0] is x
    groups = [Members((0, 2, 3), 2, 4), Members((1,), 2, 4)]
    batch = torch.arange(8)
    pieces = [{"sample": select(batch, members), "none": None} for members in groups]
    assert torch.equal(merge(pieces, groups)["sample"], batch)
    assert torch.equal(select(torch.arange(4), groups[1]), torch.tensor([1]))
    assert select(torch.arange(3), groups[1]).shape == (3,)


def test_wrong_requests() -> None:
    model = latte()
    with pytest.raises(OptionError, match="requests: expected 1, or more with an AdaCachePolicy"):
        CacheHandle(model, FirstBlockPolicy(8), requests=2)
    with adacache(model, 8, requests=3), pytest.raises(ShapeError, match="batch: expected a multiple of requests=3"):
        model(torch.randn(4, 4, 4, 8, 8), torch.zeros(4))
    assert type(model).__mro__[0].__module__ == type(model).__module__ and not hasattr(model, "_vidkernels_cache")


def test_numbers_of_another_gpu_are_waited_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event stands in the queue of the tensor's GPU, in which the copy is, whichever GPU is current."""
    recorded = []
    event = SimpleNamespace(record=recorded.append, query=lambda: bool(recorded), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    pageable = torch.empty
    monkeypatch.setattr(_to_host.torch, "empty", lambda shape, dtype, pin_memory: pageable(shape, dtype=dtype))
    value = torch.arange(4.0)
    sent = _to_host.ToHost(value)
    assert recorded == [f"stream of {value.device}"]
    assert sent.arrived() and torch.equal(sent.wait(), value)
