# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call, and why the others do not.

Every public op owns one `Dispatcher`: an ordered table from backend name to a predicate over the call's facts. A
predicate returns None when the backend can serve the call, otherwise one sentence. The same predicate decides the
automatic choice, words the error of an explicit `backend=`, and fills `vidkernels.explain(op, ...)`: there is no second
list of rules. Predicates look at device types, dtypes, numbers of dimensions and plain ints, so Dynamo can trace them.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vidkernels import _env, _library
from vidkernels._tracing import active_transform, constant_while_tracing
from vidkernels.errors import BackendUnavailable, OptionError, VidkernelsFallbackWarning
from vidkernels.triton._device import capability

Predicate = Callable[..., "str | None"]
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
FLOATING_AND_DOUBLE = (*FLOATING, torch.float64)

_DISPATCHERS: dict[str, Dispatcher] = {}
# module of ops -> the bare ops it has defined; filled by `ops._register.define`
_BARE_OPS: dict[str, list[str]] = {}
# those among them that `ops._register.define_variant` has implemented
_VARIANTS: set[str] = set()
_log = logging.getLogger("vidkernels")


def _dtype_reason(x: torch.Tensor, dtypes: Sequence[torch.dtype] | None) -> str | None:
    if dtypes is None or x.dtype in dtypes:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"dtype {str(x.dtype).removeprefix('torch.')} is not one of {names}"


def always(x: torch.Tensor, *facts: object) -> str | None:
    """Predicate of the reference backend: it serves every valid call."""
    return None


def cpp(dtypes: Sequence[torch.dtype] = FLOATING_AND_DOUBLE, check: Predicate | None = None) -> Predicate:
    """C++ kernels: CPU tensors, compiled library loaded, listed dtypes, then the op's own `check`."""

    def predicate(x: torch.Tensor, *facts: object) -> str | None:
        if not x.is_cpu:  # 0.3 us less than comparing the name of its device
            return f"it runs on cpu tensors, got {x.device.type}"
        if _library.cpu_missing is not None:
            return _library.cpu_missing
        return _dtype_reason(x, dtypes) or (None if check is None else check(x, *facts))

    return predicate


def cuda(dtypes: Sequence[torch.dtype] = FLOATING, check: Predicate | None = None) -> Predicate:
    """CUDA C++ kernels: CUDA tensors, compiled library loaded, listed dtypes, then the op's own `check`."""

    def predicate(x: torch.Tensor, *facts: object) -> str | None:
        if not x.is_cuda:
            return f"it runs on cuda tensors, got {x.device.type}"
        if _library.cuda_missing is not None:
            return _library.cuda_missing
        reason = _no_code_for(x.device) or _dtype_reason(x, dtypes)
        return reason or (None if check is None else check(x, *facts))

    return predicate


@constant_while_tracing
@lru_cache
def _no_code_for(device: torch.device) -> str | None:
    """Why the CUDA library, built for some GPUs, does not run on this one."""
    found = capability(device)
    if found == (0, 0) or _library.cuda_serves(found):
        return None
    built, number = ", ".join(_library.CUDA_ARCHITECTURES), ".".join(map(str, found))
    return (
        f"the CUDA library was built for compute capability {built}, this GPU has {number}; build it with "
        f"TORCH_CUDA_ARCH_LIST={number}"
    )


def triton(dtypes: Sequence[torch.dtype] = FLOATING, check: Predicate | None = None) -> Predicate:
    """Triton kernels: CUDA or ROCm tensors (CPU tensors only under Triton's interpreter), then the op's own `check`."""

    def predicate(x: torch.Tensor, *facts: object) -> str | None:
        if _library.triton_missing() is not None:
            return _library.triton_missing()
        if x.device.type != "cuda" and not _env.TRITON_INTERPRET:
            return f"it runs on cuda tensors, got {x.device.type}"
        return _dtype_reason(x, dtypes) or (None if check is None else check(x, *facts))

    return predicate


def pytorch(x: torch.Tensor, *facts: object) -> str | None:
    """Predicate of PyTorch's own ops behind a bare op: it is registered for these devices, the reference runs on any."""
    return None if x.device.type in ("cpu", "cuda", "meta") else f"it runs on cpu and cuda tensors, got {x.device.type}"


def note_bare_op(module: str, name: str) -> None:
    """Remember that a module of ops has defined `vidkernels::name`."""
    _BARE_OPS.setdefault(module, []).append(name)


def note_variant(name: str) -> None:
    """Remember that `vidkernels::name` is implemented in Python, whatever libraries are loaded."""
    _VARIANTS.add(name)


def _has_kernels(module: str, key: str) -> bool:
    """Whether the loaded libraries have kernels for a module's bare ops: `VIDKERNELS_OPS` may have left its stem out."""
    names = [name for name in _BARE_OPS.get(module, []) if name not in _VARIANTS]
    return not names or any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"vidkernels::{name}", key) for name in names
    )


def _has_triton(module: str) -> bool:
    """Whether a module's bare ops have Triton launchers."""
    names = _BARE_OPS.get(module, [])
    return not names or any(
        name.endswith("_triton") or hasattr(torch.ops.vidkernels, f"{name}_triton") for name in names
    )


def _refused(predicate: Predicate, reason: str) -> Predicate:
    def refuse(x: torch.Tensor, *facts: object) -> str | None:
        return predicate(x, *facts) or reason

    return refuse


@dataclass(frozen=True)
class Choice:
    """One line of `explain`: a backend, and None if it can run or the reason why it cannot."""

    backend: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """What `vidkernels.explain(op, ...)` returns; prints as a table, the chosen backend marked."""

    op: str
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> str:
        """The backend that an automatic choice takes: the first without a reason."""
        return next(choice.backend for choice in self.choices if choice.reason is None)

    def __str__(self) -> str:
        width = max(len(choice.backend) for choice in self.choices)
        lines = [f"{self.op}"]
        for choice in self.choices:
            mark = "->" if choice.backend == self.chosen else "  "
            lines.append(f"{mark} {choice.backend:<{width}}  {'ok' if choice.reason is None else choice.reason}")
        return "\n".join(lines)


class Dispatcher:
    """The backends of one public op, in order of preference.

    Args:
        op: name of the public function in `vidkernels.ops`.
        facts: takes that function's arguments, validates them, returns the tuple given to the predicates (leading tensor first).
        backends: backend name -> predicate; a backend that always runs (the reference) comes last.
        rank: where the order depends on the call: takes the facts, returns names from fast to slow; those it leaves out come
            after, in the table's order.
    """

    def __init__(
        self,
        op: str,
        *,
        facts: Callable[..., tuple[Any, ...]],
        backends: Mapping[str, Predicate],
        rank: Callable[..., Sequence[str]] | None = None,
    ) -> None:
        self.op, self.facts, self.backends, self.rank = op, facts, dict(backends), rank
        self.names = tuple(self.backends)
        for name, key in (("cpp", "CPU"), ("cuda", "CUDA")):
            if name in self.backends and not _has_kernels(facts.__module__, key):
                reason = f"the loaded library was built without {op} (VIDKERNELS_OPS at build time)"
                self.backends[name] = _refused(self.backends[name], reason)
        if "triton" in self.backends and not _has_triton(facts.__module__):
            self.backends["triton"] = _refused(self.backends["triton"], f"there is no Triton kernel for {op} yet")
        self._warned: set[str] = set()
        _DISPATCHERS[op] = self

    def select(self, backend: str, *facts: Any) -> str:
        """Name of the backend that serves a call with these facts.

        Raises:
            OptionError: `backend` is not in the table.
            BackendUnavailable: an explicit `backend` cannot serve the call, or a fallback under `VIDKERNELS_STRICT=1`.
        """
        transform = active_transform()
        if not isinstance(backend, str):
            backend = str(backend)  # no name: refused below
        if backend == "auto":
            for name in self.order(*facts):
                if self._reason(name, transform, facts) is None:
                    if name == "reference" and not torch.compiler.is_compiling():
                        self._note_fallback(*facts)
                    return name
            raise BackendUnavailable(f"{self.op}: no backend can serve this call. {self._refusals(*facts)}")
        if backend not in self.backends:
            raise OptionError(
                "backend", f"one of auto, {', '.join(self.names)}", repr(backend), f"It names a backend of {self.op}."
            )
        reason = self._reason(backend, transform, facts)
        if reason is not None:
            raise BackendUnavailable(f"{self.op}: backend {backend!r} cannot serve this call: {reason}")
        return backend

    def order(self, *facts: Any) -> Sequence[str]:
        """Names of the backends, the preferred one first; of a rank without what only another version's measurements know."""
        if self.rank is None:
            return self.names
        return [*(name for name in self.rank(*facts) if name in self.backends), *self.names]

    def _reason(self, name: str, transform: str | None, facts: Sequence[Any]) -> str | None:
        return transform if transform and name != "reference" else self.backends[name](*facts)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Every backend with None or its reason, for the public function's own arguments."""
        try:
            inspect.signature(self.facts).bind(*args, **kwargs)
        except TypeError as error:  # it would name `facts` where the caller knows the op
            raise TypeError(f"{self.op}(): {error}") from None
        facts, transform = self.facts(*args, **kwargs), active_transform()
        names = dict.fromkeys(self.order(*facts))
        return Explanation(self.op, tuple(Choice(name, self._reason(name, transform, facts)) for name in names))

    def _refusals(self, *facts: Any) -> str:
        transform = active_transform()
        if transform is not None:
            return f"Kernels: {transform}."
        reasons = {name: predicate(*facts) for name, predicate in self.backends.items()}
        return " ".join(f"{name}: {reason}." for name, reason in reasons.items() if reason is not None)

    def _note_fallback(self, *facts: Any) -> None:
        reasons = self._refusals(*facts)
        if not reasons or reasons in self._warned:
            return
        text = f"{self.op} runs on the reference backend. {reasons}"
        if _env.STRICT:
            raise BackendUnavailable(text)
        self._warned.add(reasons)
        warnings.warn(text, VidkernelsFallbackWarning, stacklevel=4)
        _log.info(text)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The distinct reasons for which this op has fallen back to the reference in this process."""
        return tuple(sorted(self._warned))


def dispatchers() -> Mapping[str, Dispatcher]:
    """All public ops that were imported so far, by name."""
    return dict(_DISPATCHERS)


def op(name: str, backend: str) -> Callable[..., Any]:
    """The bare op of a backend: `vidkernels::name` for C++ and CUDA, `vidkernels::name_triton` for Triton."""
    return getattr(torch.ops.vidkernels, f"{name}_triton" if backend == "triton" else name).default
