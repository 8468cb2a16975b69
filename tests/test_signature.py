# SPDX-License-Identifier: Apache-2.0
"""Calls that look alike are decided once, and those that do not are not: types of options, tensors, states of the process."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from vidkernels import _measured, _signature, ops
from vidkernels.errors import VidkernelsError
from vidkernels.ops import _causal_conv3d_call, _register

LAST = torch.channels_last_3d
conv, channel, group = (
    importlib.import_module(f"vidkernels.ops.{name}") for name in ("causal_conv3d", "channel_norm", "group_norm")
)


def clip(channels: int = 16) -> Tensor:
    return torch.randn(1, channels, 3, 6, 6).contiguous(memory_format=LAST)


def calls() -> dict[str, tuple[Any, str, Callable[..., Tensor], dict[str, Any]]]:
    """Module, the function whose calls say that a call was decided anew, and a call."""
    x, weight, affine = clip(), torch.randn(16, 16, 3, 3, 3), torch.randn(16)
    return {
        "causal_conv3d": (conv, "prepare", ops.causal_conv3d, {"x": x, "weight": weight, "bias": affine, "stride": (1, 1, 1)}),
        "channel_norm": (channel, "_facts", ops.channel_norm, {"x": x, "weight": affine, "eps": 1e-5}),
        "group_norm": (group, "_facts", ops.group_norm, {"x": x, "num_groups": 4, "weight": affine, "eps": 1.0}),
    }  # fmt: skip


@pytest.fixture(params=list(calls()))
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An op, arguments, and a list that grows where a call is decided by all checks."""
    module, name, function, arguments = calls()[request.param]
    decided: list[int] = []
    checks = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        decided.append(1)
        return checks(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return function, arguments, decided


def test_a_repeated_call_is_not_decided_again(subject: Any) -> None:
    function, arguments, decided = subject
    first = function(**arguments)
    again = function(**{**arguments, "x": arguments["x"] + 1})
    assert torch.equal(function(**arguments), first) and not torch.equal(again, first)
    assert len(decided) == 1


def test_what_is_not_alike_is_decided_anew(subject: Any) -> None:
    function, arguments, decided = subject
    function(**arguments)
    x = arguments["x"]
    others: list[dict[str, Any]] = [
        {"x": x[:, :, :2]},
        {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()},
        {"activation": "silu"},
        {"backend": "cpp"},
    ]
    for count, other in enumerate(others, 2):
        function(**{**arguments, **other})
        assert len(decided) == count, other


def test_options_that_equal_others_are_still_checked() -> None:
    """True equals 1, and 1.0 as well; a failed call is not remembered."""
    x, weight, affine = clip(), torch.randn(16, 16, 3, 3, 3), torch.randn(16)
    for function, good, bad in (
        (lambda o: ops.causal_conv3d(x, weight, stride=o), 1, True),
        (lambda o: ops.causal_conv3d(x, weight, stride=o), (1, 1, 1), (1, True, 1)),
        (lambda o: ops.causal_conv3d(x, weight, stride=o), (1, 1, 1), (1, 1.0, 1)),
        (lambda o: ops.causal_conv3d(x, weight, return_history=o), False, 0),
        (lambda o: ops.channel_norm(x, affine, dim=o), 1, True),
        (lambda o: ops.group_norm(x, o), 1, True),
        (lambda o: ops.group_norm(x, 4, per_frame=o), False, 0),
    ):
        for _ in range(2):
            function(good)
            with pytest.raises(VidkernelsError):
                function(bad)


def test_bytes_stand_for_no_numbers() -> None:
    """A numpy number is written as its bytes, which other objects may share: nothing is kept for it."""
    np = pytest.importorskip("numpy")
    x, weight = clip(), torch.randn(16, 16, 3, 3, 3)
    before = len(conv._DECISIONS)
    right = ops.causal_conv3d(x, weight, stride=np.int64(1))
    assert len(conv._DECISIONS) == before
    with pytest.raises(VidkernelsError):
        ops.causal_conv3d(x, weight, stride=np.int64(1).tobytes())
    assert torch.equal(right, ops.causal_conv3d(x, weight))


@pytest.mark.parametrize("name", list(calls()))
def test_tensors_of_other_kinds_are_checked(name: str) -> None:
    """Sparse, nested, quantized and foreign values after a plain one of the same shape."""
    _, _, function, arguments = calls()[name]
    function(**arguments)
    x = arguments["x"]
    nested = torch.nested.nested_tensor([x[0], x[0]])
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    for bad in (x.contiguous().to_sparse(), nested, quantized, x.numpy(), None):
        with pytest.raises(VidkernelsError):
            function(**{**arguments, "x": bad})
    for bad in (arguments["weight"].to_sparse(), arguments["weight"].to("meta"), arguments["weight"].numpy()):
        with pytest.raises(VidkernelsError):
            function(**{**arguments, "weight": bad})


class _Wrapped(Tensor):
    pass


def test_subclasses_fakes_and_transforms_have_no_signature() -> None:
    x = torch.randn(2, 3)
    options = (1, "zeros")
    assert _signature.signature(options, x, None, torch.nn.Parameter(x)) is not None
    assert _signature.signature(options, x.as_subclass(_Wrapped)) is None
    assert _signature.signature((object(),), x) is None and _signature.signature(options, x.to_sparse()) is None
    with FakeTensorMode():
        assert _signature.signature(options, torch.empty(2, 3)) is None
    found: list[Any] = []
    torch.func.vmap(lambda row: (found.append(_signature.signature(options, row)), row)[1])(x)
    with forward_ad.dual_level():
        found.append(_signature.signature(options, x))
    assert found == [None, None]


def test_measurements_are_heeded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = clip(), torch.randn(16, 16, 3, 3, 3)
    served: list[str] = []
    for backend in ("cpp", "torch", "cpp"):
        monkeypatch.setattr(_measured, "order", lambda *args, backend=backend: (backend,))
        _measured.forget()
        for _ in range(2):
            _, decision = conv._decided(
                x, weight, None, None, None, "auto", (1, 1, "zeros", None, None, "zeros", None, False)
            )
            served.append(decision.backend)
    assert served == ["cpp", "cpp", "torch", "torch", "cpp", "cpp"]


def test_float32_precision_is_part_of_a_signature_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 may be forbidden between two calls; decided on fake shapes of a GPU's facts, since the rest of a key is as here."""
    keys: list[Any] = []

    class Recorded(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            keys.append(key)
            return default

        def keep(self, *args: Any) -> None:
            pass

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(conv, "_DECISIONS", Recorded())
    monkeypatch.setattr(_signature, "_PLAIN", frozenset({Tensor, OnGpu}))
    x, weight = clip().as_subclass(OnGpu), torch.randn(16, 16, 3, 3, 3)
    for allowed in (True, False, True):
        monkeypatch.setattr(_causal_conv3d_call, "tf32_allowed", lambda allowed=allowed: allowed)
        conv._decided(x, weight, None, None, None, "auto", (1, 1, "zeros", None, None, "zeros", None, False))
    assert keys[0] == keys[2] != keys[1]


def test_history_is_trimmed_and_autocast_heeded_in_repeated_calls() -> None:
    x, weight, past = clip(), torch.randn(16, 16, 3, 3, 3), clip()
    for frames in (1, 2, 3):
        history = past[:, :, :frames]
        first = ops.causal_conv3d(x, weight, history=history, return_history=True)
        again = ops.causal_conv3d(x, weight, history=history, return_history=True)
        right = ops.causal_conv3d(x, weight, history=history, backend="reference")
        assert all(map(torch.equal, first, again))
        torch.testing.assert_close(first[0], right, rtol=1e-4, atol=1e-4)
    assert ops.causal_conv3d(x, weight).dtype == torch.float32
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.causal_conv3d(x, weight).dtype == torch.bfloat16
    assert ops.causal_conv3d(x, weight).dtype == torch.float32


def test_gradients_and_inference_share_a_decision(subject: Any) -> None:
    function, arguments, decided = subject
    function(**arguments)
    x = arguments["x"].clone().requires_grad_()
    y = function(**{**arguments, "x": x})
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all() and len(decided) == 1
    with torch.inference_mode():
        assert torch.equal(function(**arguments), y)
    assert len(decided) == 1


def test_memos_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_signature, "_MOST", 4)
    affine = torch.randn(16)
    for frames in range(1, 12):
        ops.channel_norm(torch.randn(1, 16, frames), affine)
        assert 1 <= len(channel._DECISIONS) <= 4


def test_threads_share_a_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided, forgotten and cleared at the same time."""
    monkeypatch.setattr(_signature, "_MOST", 3)
    inputs = [torch.randn(1, 16, frames) for frames in range(1, 7)]
    affine = torch.randn(16)
    right = [ops.channel_norm(x, affine) for x in inputs]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for step in range(120):
            place = (step + offset) % len(inputs)
            if not torch.equal(ops.channel_norm(inputs[place], affine), right[place]):
                wrong.append(place)
            if step % 10 == 0:
                _signature.forget()

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_watches_sees_bare_ops() -> None:
    """A repeated call passes torch's dispatcher by; modes, traces and profilers are shown it all the same."""
    x, weight = clip(), torch.randn(16, 16, 3, 3, 3)

    def call(x: Tensor) -> Tensor:
        return ops.causal_conv3d(x, weight)

    call(x), call(x)
    assert not _register.is_watched()
    with _Names() as names:
        assert _register.is_watched()
        call(x)
    assert "vidkernels::causal_conv3d_fwd" in names.found
    assert "vidkernels::causal_conv3d_fwd" in str(torch.jit.trace(call, (x,), check_trace=False).graph)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    assert any(event.key == "vidkernels::causal_conv3d_fwd" for event in profile.key_averages())


def test_implementations_in_python_are_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = clip(), torch.randn(16, 16, 3, 3, 3)
    for backend in ("cpp", "torch"):
        right = ops.causal_conv3d(x, weight, backend=backend)
        assert torch.equal(ops.causal_conv3d(x, weight, backend=backend), right)
    monkeypatch.setattr(conv, "bare_op", lambda *args: pytest.fail("through the dispatcher"))
    ops.causal_conv3d(x, weight, backend="torch")


def test_results_are_written_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Triton and cuDNN write `out` themselves, the residual included: no result is made and copied."""
    x, weight = clip(), torch.randn(16, 16, 3, 3, 3)
    out, seen = clip(), []

    def launch(*args: Any, out: Tensor) -> Tensor:
        seen.append((args[4] is out, out))
        return out

    for backend in ("triton", "cudnn", "torch"):
        for residual in (None, out):
            options = (1, 1, "zeros", None, None, "zeros", None, False)
            call, decision = conv._decided(x, weight, None, None, residual, "cpp", options)
            decision = decision._replace(backend=backend, launch=SimpleNamespace(direct=launch))
            if backend == "torch":
                monkeypatch.setattr(conv, "_computed", lambda call, decision: torch.ones_like(call.x))
                value = 1 if residual is None else 1 + float(out.mean())
                assert float(conv._computed_into(out, call, decision).mean()) == pytest.approx(value)
            else:
                assert conv._computed_into(out, call, decision) is out
    assert [same for same, _ in seen] == [False, True, False, True] and all(t is out for _, t in seen)
