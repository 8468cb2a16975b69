# SPDX-License-Identifier: Apache-2.0
"""Definition of bare ops: schema, fake and, where there is one, the Triton launcher. Kernels in C++ and CUDA register
themselves under the same name from the compiled libraries, in either order of loading.

A plain `Library.define` costs 4 us a call; `torch.library.custom_op` or a Python autograd registration costs 20-26 us,
more than most kernels here take, so neither is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vidkernels import _env, dispatch

_LIBRARY = torch.library.Library("vidkernels", "FRAGMENT")
# Kinds of device, of launchers in Triton and of PyTorch's own ops.
TRITON_KEYS = ("CUDA", "CPU") if _env.TRITON_INTERPRET else ("CUDA",)
PYTORCH_KEYS = ("CPU", "CUDA")
# bare op implemented in Triton -> "module:function" of its launcher
TRITON: dict[str, str] = {}
# bare op, kind of device -> its implementation, of those in Python
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}

# Without the check that CUDA is initialized, as it is where there is a tensor; not in builds without CUDA.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_tracing = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled


def _lazy(target: str) -> Callable[..., Any]:
    name, _, function = target.partition(":")
    module: ModuleType | None = None

    def launch(*args: Any, **kwargs: Any) -> Any:
        nonlocal module
        if module is None:  # kept: looking an imported module up takes 2 us
            module = importlib.import_module(name)
        return getattr(module, function)(*args, **kwargs)

    return launch


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first tensor current: Triton and cuDNN launch on the current one, whatever they are given."""

    def launch_there(*args: Any, **kwargs: Any) -> Any:
        # The first argument may be a gradient that nobody has asked for: None.
        for x in args:
            if isinstance(x, torch.Tensor):
                break
        device = x.get_device()
        if device == _current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return launch_there


def define(name: str, schema: str, fake: Callable[..., Any], *, triton: str | None = None) -> None:
    """Define `vidkernels::name`, and `vidkernels::name_triton` if a launcher is given.

    Args:
        name: bare op's name, e.g. `fsq_fwd`.
        schema: argument and return part, e.g. `(Tensor z, int[] levels) -> (Tensor, Tensor)`.
        fake: shape function with the same arguments; it checks with `torch._check`.
        triton: `"module:function"` of the Triton launcher, imported at the first call; a module that is not there yet leaves
            the op without that backend, and dispatch says so.
    """
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vidkernels::{name}", fake, lib=_LIBRARY)
    dispatch.note_bare_op(fake.__module__, name)
    if triton is None or importlib.util.find_spec(triton.partition(":")[0]) is None:
        return
    _LIBRARY.define(f"{name}_triton{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vidkernels::{name}_triton", fake, lib=_LIBRARY)
    TRITON[f"{name}_triton"] = triton
    for key in TRITON_KEYS:
        implement(f"{name}_triton", triton, key)


def define_variant(
    name: str, suffix: str, schema: str, fake: Callable[..., Any], target: str, keys: tuple[str, ...]
) -> None:
    """Define `vidkernels::name_suffix` with the schema of `name`, implemented by `"module:function"` for `keys`."""
    define(f"{name}_{suffix}", schema, fake)
    dispatch.note_variant(f"{name}_{suffix}")
    if suffix == "triton":
        TRITON[f"{name}_{suffix}"] = target
    for key in keys:
        implement(f"{name}_{suffix}", target, key)


def implement(name: str, target: str, key: str) -> None:
    """Implement the defined `vidkernels::name` by `"module:function"`, imported at the first call."""
    launch = _on_its_device(_lazy(target)) if key == "CUDA" else _lazy(target)
    _LIBRARY.impl(name, launch, key)
    _IMPLEMENTATIONS[name, key] = launch


def implementation(op: Any, x: torch.Tensor) -> Callable[..., Any] | None:
    """What a bare op runs for tensors like x where that is Python: the same call without torch's dispatcher, which takes 5
    to 12 us to go from Python to Python. None for kernels in C++ and CUDA.

    It serves calls that need no gradient and that nobody watches.
    """
    name = op._schema.name.partition("::")[2]
    return _IMPLEMENTATIONS.get((name, "CUDA" if x.is_cuda else "CPU"))


class Launcher:
    """The bare op of a backend, ready to be called for plain tensors on one kind of device that need no gradient."""

    __slots__ = ("direct", "op")

    def __init__(self, op: Callable[..., Any], x: torch.Tensor) -> None:
        self.op = op
        self.direct = implementation(op, x)

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if self.direct is None or is_watched() else self.direct(*args)


def is_watched() -> bool:
    """Whether somebody is to see the bare ops: a mode, fake tensors and recorders among them, `torch.jit.trace`, a profiler."""
    return _modes() != 0 or _function_mode() or _profiled() or _tracing() is not None
