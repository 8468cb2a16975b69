# SPDX-License-Identifier: Apache-2.0
"""What a rule is, and the table of rules: the package's own, loaded at first use, and those users register."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vidkernels.dispatch import Dispatcher
from vidkernels.errors import OptionError

_USUAL_BACKENDS = ("auto", "cpp", "cuda", "cudnn", "triton", "torch", "reference")


@dataclass(frozen=True)
class Rule:
    """How one upstream module class is made fast.

    Args:
        name: unique, dotted by upstream library, e.g. `diffusers.vidtok.encoder`.
        ops: names of the ops that the fused forward calls; `patch(ops=...)` selects by them.
        targets: `"module:Class"` strings of the upstream classes, looked up in `sys.modules` only: patching imports no
            model library.
        mixin: class whose `forward` replaces the upstream one; it calls `super().forward` for what it cannot serve.
        digests: known digests of upstream code, `"Class.method"` or `"function"` of the class's module -> digests
            (`patching.digest`). Everything that the fused forward stands in for belongs here: another digest is a near
            miss, not a match.
        features: names of children, descendants (`fn.0.conv`) or attributes without which, or, behind `!`, with which a class
            of the right name is another thing altogether: no near miss, nothing to report. For rules whose class is called
            `FinalLayer` or the like.
        reads: names of descendants whose weights are read without calling them; `"*"` for all, empty for none.
        subsumes: the rule serves the whole subtree; rules that match below it are not applied.
        check: structural refusal: `check(module)` returns None or one sentence.
        backward: the fused forward is differentiable.
        dtypes: parameter dtypes that are served; others are refused with the reason.
        widen: `widen(module)` turns a copy into one that `verify` can run on float64 inputs as the truth; `.double()` is not
            enough for a module that casts to float32 inside.
        result: `result(returned)` is what `verify` compares of a module's return value, where the rest are caches of which
            less is kept than upstream.
        sample: `sample(module)` -> `(args, kwargs)`: small synthetic inputs for `verify=True`; None where the module's own
            forward cannot be called, as upstream wrote it.
        projections: `projections(module)` -> the layers that project, through SiLU, a condition that all blocks of a model
            share, and that the fused forward calls with `_modulation.project`: `patch(batch_modulation=True)` stacks them.
        inductor: where the chain is so short that Inductor alone makes one equally fast kernel of it, or a better one
            together with its neighbours, one sentence that says so: `patch(for_compile=True)` leaves the rule out.
        tested_versions: upstream releases against which the equality tests ran, e.g. `diffusers 0.42.1`.
        expires: upstream version that makes the rule useless, or an empty string while none is known.
    """

    name: str
    ops: tuple[str, ...]
    targets: tuple[str, ...]
    mixin: type
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    subsumes: bool = False
    check: Callable[[torch.nn.Module], str | None] | None = None
    backward: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    widen: Callable[[torch.nn.Module], torch.nn.Module] = torch.nn.Module.double
    result: Callable[[Any], Any] | None = None
    sample: Callable[[torch.nn.Module], tuple[tuple[Any, ...], dict[str, Any]] | None] | None = None
    projections: Callable[[torch.nn.Module], Sequence[torch.nn.Module]] | None = None
    inductor: str = ""
    tested_versions: tuple[str, ...] = ()
    expires: str = ""

    def __post_init__(self) -> None:
        for target in self.targets:
            if target.count(":") != 1:
                raise OptionError("targets", "strings of the form 'package.module:Class'", repr(target))
        if not self.ops:
            raise OptionError("ops", "at least one op name", "an empty tuple")

    @property
    def label(self) -> str:
        """How reports and `repr(model)` call what the rule uses."""
        return "+".join(self.ops)


class RuleTable(tuple[Rule, ...]):
    """All rules in the order in which they are tried; prints as a table."""

    def __str__(self) -> str:
        rows = [("rule", "ops", "class", "tested with")]
        for rule in self:
            classes = dict.fromkeys(target.partition(":")[2] for target in rule.targets)  # modules would fill the line
            tested = ", ".join(rule.tested_versions) or "-"
            until = f", until {rule.expires}" if rule.expires else ""
            rows.append((rule.name, " ".join(rule.ops), " ".join(classes), tested + until))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


_USER: list[Rule] = []
_BUILTIN: list[Rule] = []
_LOADED: set[str] = set()


def _load_builtin() -> None:
    from vidkernels.patching.rules import RULES

    for entry in RULES:
        if entry in _LOADED:
            continue
        module, _, attribute = entry.partition(":")
        loaded = getattr(importlib.import_module(module), attribute)
        _BUILTIN.extend([loaded] if isinstance(loaded, Rule) else loaded)
        _LOADED.add(entry)


def rules() -> RuleTable:
    """Every known rule: the user's own first (the latest registered leads), then the package's."""
    _load_builtin()
    return RuleTable([*reversed(_USER), *_BUILTIN])


def register_rule(rule: Rule) -> Rule:
    """Add a rule, for a vendored or modified copy of a model. It is tried before all earlier ones.

    A rule of the same name is replaced. Modules patched before keep their forward until `unpatch`.

    Raises:
        OptionError: `rule` is not a `Rule`, or its name belongs to one of the package's own rules.
    """
    if not isinstance(rule, Rule):
        raise OptionError("rule", "a vidkernels.patching.Rule", type(rule).__name__)
    _load_builtin()
    if any(known.name == rule.name for known in _BUILTIN):
        raise OptionError(
            "rule.name", "a name of your own", repr(rule.name), "The package's own rules cannot be replaced."
        )
    _USER[:] = [known for known in _USER if known.name != rule.name]
    _USER.append(rule)
    return rule


def select_rules(ops: str | Sequence[str]) -> tuple[Rule, ...]:
    """The rules that `patch(ops=...)` may use: all for `"auto"`, else those named or whose ops are all named.

    Raises:
        OptionError: an unknown op or rule name, with the nearest known spelling.
    """
    table = rules()
    if isinstance(ops, str) and ops == "auto":
        return table
    if not isinstance(ops, Iterable):
        raise OptionError("ops", "'auto' or names out of vidkernels.rules()", repr(ops))
    wanted = [ops] if isinstance(ops, str) else list(ops)
    known = sorted({op for rule in table for op in rule.ops} | {rule.name for rule in table})
    for name in wanted:
        if name not in known:
            raise OptionError(
                "ops", "'auto' or names out of vidkernels.rules()", repr(name), _nearest(str(name), known)
            )
    return tuple(rule for rule in table if rule.name in wanted or set(rule.ops) <= set(wanted))


# A backend that serves some convolutions of one architecture: named for a whole model, it would refuse the others.
_NAMED_BY_OP = {("causal_conv3d", "cuda")}


def backend_of(backend: str | Mapping[str, str], rule: Rule) -> dict[str, str]:
    """Backend name per op of a rule, from the `backend` argument of `patch`.

    One name for all ops is meant where an op has such a backend; the others choose for themselves.
    """
    if isinstance(backend, str):
        served = {op for op in rule.ops if backend in known_backends(op) and (op, backend) not in _NAMED_BY_OP}
        return {op: backend if op in served else "auto" for op in rule.ops}
    return {op: backend.get(op, "auto") for op in rule.ops}


def check_backend(backend: str | Mapping[str, str]) -> None:
    """Validate the `backend` argument of `patch` as a whole, before anything is touched.

    Raises:
        OptionError: a backend that no op has, or that the op it is named for does not have; or an unknown op.
    """
    ops = sorted({op for rule in rules() for op in rule.ops})
    if isinstance(backend, str):
        every = list(dict.fromkeys(name for op in ops for name in known_backends(op)))
        if backend not in every:
            raise OptionError("backend", f"one of {', '.join(every)}", repr(backend), _nearest(str(backend), every))
        return
    if not isinstance(backend, Mapping):
        raise OptionError("backend", "a name, or a mapping of ops to names", repr(backend))
    for op, name in backend.items():
        if op not in ops:
            raise OptionError("backend", "op names out of vidkernels.rules()", repr(op), _nearest(str(op), ops))
        known = known_backends(op)
        if name not in known:
            expected = f"one of {', '.join(known)} for {op}"
            raise OptionError("backend", expected, repr(name), _nearest(str(name), known))


def known_backends(op: str) -> tuple[str, ...]:
    """`auto` and the backends of an op's dispatchers; for an op of the caller's own rule, every usual name."""
    module = f"vidkernels.ops.{op}"
    if importlib.util.find_spec(module) is None:
        return _USUAL_BACKENDS
    tables = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, Dispatcher)]
    return ("auto", *dict.fromkeys(name for table in tables for name in table.names))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
