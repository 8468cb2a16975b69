# SPDX-License-Identifier: Apache-2.0
"""Equality of a patched module with its original, judged against float64.

Everything runs on deep copies of one module at a time, in eval mode, with the random state forked: the model's buffers,
caches, gradients and hooks are not touched, and a model that fills the memory need not fit twice.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from vidkernels.errors import OptionError, PatchError
from vidkernels.patching import _mechanism

_SEED = 20240531
WHOLE = "whole model"  # in place of a rule: the patched model beside the original, with no float64 truth
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Numerics:
    """One comparison that `verify` made.

    `allowed` = 2 x error of the original + one rounding of max|truth| (for gradients 2 x (error of the original + eps |truth|),
    see `_judge`), or 0 where bits must agree.

    Errors of outputs are the largest absolute difference from float64, errors of gradients its L2 norm. The original
    runs twice, the second time on inputs moved by one rounding, and its larger error counts: for a gradient that is one
    number, a single lucky run would be no yardstick. Where the patched module is worse, the original runs more often
    before that counts. For gradients see also `_with_noise_floor`.
    """

    name: str
    cls: str
    rule: str
    what: str
    inputs: str
    error_original: float
    error_patched: float
    allowed: float
    difference: str = ""

    @property
    def ok(self) -> bool:
        """Whether the patched module keeps the promise."""
        return not self.difference and self.error_patched <= self.allowed

    def __str__(self) -> str:
        errors = f"error {self.error_patched:.3g} (original {self.error_original:.3g}, allowed {self.allowed:.3g})"
        if self.rule == WHOLE:
            errors = f"{self.error_patched:.3g} from the original's"
        return f"{self.name or '(model)'} [{self.cls}] {self.what} on {self.inputs}: {self.difference or errors}"


@dataclass(frozen=True)
class Subject:
    """One module to compare: its name, the patched class it is about to get, and the backends."""

    name: str
    module: nn.Module
    cls: type
    backends: Mapping[str, str]
    rule: str
    inputs: Inputs
    widen: Callable[[nn.Module], nn.Module] = nn.Module.double
    result: Callable[[Any], Any] | None = None


def compare(subject: Subject, *, backward: bool, exact: bool) -> list[Numerics]:
    """Run original, patched and float64 copies of one module on the same inputs."""
    module = subject.module

    def originals(seeds: Iterable[int]) -> list[dict[str, torch.Tensor]]:
        return [_run(_copy(module), _nudge(subject.inputs, seed), backward, subject.result) for seed in seeds]

    runs = [_run(_copy(module), subject.inputs, backward, subject.result), *([] if exact else originals((0,)))]
    candidate = _copy(module)
    _mechanism.reclass(candidate, subject.cls, subject.backends)
    patched = _run(candidate, subject.inputs, backward, subject.result)
    del candidate
    with torch.autocast(_device(module).type, enabled=False):
        truth = _run(subject.widen(_copy(module)), _to_double(subject.inputs), backward, subject.result)
    results = _judge_all(subject, runs, patched, truth, exact)
    if not exact and any(not result.ok and not result.difference for result in results):
        # The original of a small module has lucky runs, and a comparison can fail for that alone.
        results = _judge_all(subject, [*runs, *originals(range(1, 5))], patched, truth, exact)
    return results


def _judge_all(
    subject: Subject,
    runs: Sequence[dict[str, torch.Tensor]],
    patched: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    exact: bool,
) -> list[Numerics]:
    """One comparison for every tensor that the original returns; `runs`: of the original."""
    described, results = describe(subject.inputs), []
    for key in runs[0]:
        kind = "gradient" if key.startswith("gradient") else "exact" if exact else "output"
        numbers = _judge([run[key] for run in runs], patched.get(key), truth.get(key), kind)
        cls = type(subject.module).__name__
        results.append(Numerics(subject.name, cls, subject.rule, key, described, *numbers))
    return _with_noise_floor(results, {key: tensor.numel() for key, tensor in runs[0].items()})


def _with_noise_floor(results: list[Numerics], sizes: Mapping[str, int]) -> list[Numerics]:
    """No gradient is held to less than the noise that the original's gradients have in the median, per element.

    A gradient may cancel to nothing, as a key's bias before softmax does: both versions then return their rounding
    noise, and the ratio of the two says nothing.
    """
    gradients = [r for r in results if r.what.startswith("gradient") and sizes[r.what]]
    if not gradients:
        return results
    noise = statistics.median(r.error_original / sizes[r.what] ** 0.5 for r in gradients)
    return [
        replace(r, allowed=max(r.allowed, 2 * noise * sizes[r.what] ** 0.5)) if r.what.startswith("gradient") else r
        for r in results
    ]


def _judge(
    originals: Sequence[torch.Tensor], patched: torch.Tensor | None, truth: torch.Tensor | None, kind: str
) -> tuple[float, float, float, str]:
    """(error of the original, error of the patched, allowed, structural difference)."""
    original = originals[0]
    if patched is None or truth is None:
        return 0.0, 0.0, 0.0, "the patched module returns fewer tensors"
    if patched.shape != original.shape or patched.dtype != original.dtype or patched.device != original.device:
        got = f"{tuple(patched.shape)} {patched.dtype} {patched.device}"
        return 0.0, 0.0, 0.0, f"expected {tuple(original.shape)} {original.dtype} {original.device}, got {got}"
    if kind == "exact" or not original.dtype.is_floating_point:
        # A discrete output may differ from the original only where the original itself differs from float64.
        agrees = (patched == original) | (patched.isnan() & original.isnan())
        agrees = agrees if kind == "exact" else agrees | (patched == truth.to(original.dtype))
        wrong = int((~agrees).sum())
        return 0.0, float(wrong), 0.0, f"{wrong} of {original.numel()} values differ" if wrong else ""
    finite = original.isfinite()
    if not torch.equal(finite, patched.isfinite()):
        return 0.0, 0.0, 0.0, "NaN or Inf at other places than the original"
    reference = torch.where(finite, truth.double(), 0)

    def size(value: torch.Tensor) -> float:
        # Outputs: the largest difference. Gradients: the L2 norm, for a parameter's gradient sums over everything.
        order = 2.0 if kind == "gradient" else float("inf")
        return float(torch.linalg.vector_norm(value, order)) if value.numel() else 0.0

    errors = [size(torch.where(finite, value.double(), 0) - reference) for value in (*originals, patched)]
    # Two versions add up a gradient in different orders, so there each gets a rounding of its own in the budget.
    roundings = 4 if kind == "gradient" else 1
    worst, error = max(errors[:-1]), errors[-1]
    return worst, error, 2 * worst + roundings * torch.finfo(original.dtype).eps / 2 * size(reference), ""


def _nudge(inputs: Inputs, seed: int) -> Any:
    """The inputs with every floating value moved to a neighbouring one, up or down at random."""
    generator = torch.Generator().manual_seed(_SEED + seed)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        up = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.5
        infinity = torch.full_like(tensor, float("inf"))
        return torch.where(up, tensor.nextafter(infinity), tensor.nextafter(-infinity))

    return pytree.tree_map_only(torch.Tensor, move, inputs)


def _run(
    module: nn.Module, inputs: Inputs, backward: bool, result: Callable[[Any], Any] | None
) -> dict[str, torch.Tensor]:
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with fixed_random_state(_device(module)), torch.set_grad_enabled(backward):
        if backward:
            for leaf in leaves:
                leaf.requires_grad_(leaf.is_floating_point())
        returned = module(*args, **kwargs)
        compared = returned if result is None else result(returned)
        outputs = [leaf for leaf in pytree.tree_leaves(compared) if isinstance(leaf, torch.Tensor)]
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if backward:
            found.update(_gradients(module, leaves, outputs))
    return found


def _gradients(module: nn.Module, leaves: list[torch.Tensor], outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    wanted = {f"gradient of input {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    wanted.update({f"gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad})
    differentiable = [output for output in outputs if output.requires_grad]
    if not wanted or not differentiable:
        return {}
    generator = torch.Generator().manual_seed(_SEED)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in differentiable
    ]
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), cotangents, allow_unused=True)
    return {key: g for key, g in zip(wanted, gradients, strict=True) if g is not None}


def _copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module).eval()
    for child in copied.modules():
        child.zero_grad(set_to_none=True)
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks):
            hooks.clear()
    return copied


def _to_double(inputs: Inputs) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def _device(module: nn.Module) -> torch.device:
    tensor = next(iter(module.parameters()), None)  # magvit2-pytorch overrides it with a list
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def fixed_random_state(device: torch.device) -> Iterator[None]:
    """A forked, re-seeded random state on the CPU and on `device`."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers and plain attributes (streaming caches, flags) of every module afterwards."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = [{name: b.detach().clone() for name, b in held.items() if b is not None} for held in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, before, held, saved in zip(modules, attributes, buffers, values, strict=True):
                module.__dict__.clear()
                module.__dict__.update(before)
                module._buffers.clear()
                module._buffers.update(held)
                for name, value in saved.items():
                    module.get_buffer(name).copy_(value)


def capture(model: nn.Module, inputs: Inputs, wanted: list[nn.Module]) -> tuple[Any, dict[nn.Module, Inputs]]:
    """Run the model once; return its output and the first inputs that each wanted module received."""
    seen: dict[nn.Module, Inputs] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in seen:
            seen[module] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))

    args, kwargs = inputs
    handles = []
    with untouched(model), torch.no_grad(), fixed_random_state(_device(model)):
        model.eval()
        try:
            handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in wanted]
            output = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return output, seen


def whole(cls: str, expected: Any, actual: Any, inputs: Inputs) -> list[Numerics]:
    """Compare the outputs of the whole model: same structure, and the difference for the report.

    There is no float64 truth of the whole here, so `allowed` is the difference itself; each module was judged before.
    """
    found = []
    pairs = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (expected, actual)
    ]
    if len(pairs[0]) != len(pairs[1]):
        raise PatchError(f"verify: the patched model returns {len(pairs[1])} tensors, the original {len(pairs[0])}.")
    for i, (original, patched) in enumerate(zip(*pairs, strict=True)):
        _, difference, _, wrong = _judge([original], patched, original, "output")
        result = Numerics("", cls, WHOLE, f"output {i}", describe(inputs), 0.0, difference, difference, wrong)
        if wrong and original.dtype.is_floating_point:
            raise failure(result)
        found.append(result)
    return found


def synthetic(module: nn.Module, sample: Callable[[nn.Module], Inputs | None]) -> Inputs | None:
    """A rule's synthetic inputs; drawing them leaves the caller's random state alone."""
    with fixed_random_state(_device(module)):
        return sample(module)


def normalise(verify: Any) -> Inputs:
    """`x`, `(x, y)`, `{"x": x}` or `(args, kwargs)` as `(args, kwargs)`."""
    if isinstance(verify, tuple) and len(verify) == 2 and isinstance(verify[0], tuple) and isinstance(verify[1], dict):
        return verify
    if isinstance(verify, dict):
        return (), verify
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(verify)):
        expected = "True, or inputs of the model: a tensor, a tuple of them, a dict of arguments or (args, kwargs)"
        raise OptionError("verify", expected, repr(verify))
    return (verify if isinstance(verify, tuple) else (verify,)), {}


def describe(inputs: Inputs) -> str:
    """Shapes and dtypes of the tensors among the inputs."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return ", ".join(f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves) or "no tensors"


def failure(worst: Numerics) -> PatchError:
    """The error for a broken promise: the module, its inputs, both errors, and the way to leave it out."""
    return PatchError(
        f"verify: {worst}. The model is as it was. To leave the module out: "
        f"vidkernels.patch(model, exclude=({worst.name!r},)); to report: rule {worst.rule}."
    )
