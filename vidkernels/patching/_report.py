# SPDX-License-Identifier: Apache-2.0
"""What `patch`, `explain` and `status` return: plain data that prints as a short table."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from vidkernels.patching import _mechanism
from vidkernels.patching._verify import WHOLE, Numerics

_LINES = 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a `PatchReport` says about one module.

    Args:
        name: fully qualified name; `aliases` are its other names if the model holds it at several places.
        cls: class name.
        op: the ops of the rule, joined by `+`.
        rule: name of the rule.
        backend: requested backend, one word if the same for all ops.
        state: `patched`, `already`, `skipped` or `near_miss`.
        reason: why it is not patched; for `already`, which backend changed.
        repairable: it was skipped for something that the caller can do something about; an error under `strict=True`.
    """

    name: str
    cls: str
    op: str
    rule: str
    backend: str
    state: str
    reason: str = ""
    aliases: tuple[str, ...] = ()
    repairable: bool = False


def backend_label(backends: Mapping[str, str]) -> str:
    """`triton` if all ops share it, else `op=backend` pairs."""
    names = set(backends.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{op}={name}" for op, name in backends.items())


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` did, module by module; true if anything is patched. As a context manager it undoes that on exit.

    It refers to the model weakly: a kept report keeps no weights alive. `batched` counts the layers that
    `batch_modulation` stacked.
    """

    entries: tuple[Entry, ...]
    numerics: tuple[Numerics, ...] = ()
    dry_run: bool = False
    batched: int = 0
    _changed: tuple[weakref.ref[nn.Module], ...] = dataclasses.field(default=(), repr=False, compare=False)

    def _in_state(self, *states: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.state in states)

    @property
    def patched(self) -> tuple[Entry, ...]:
        """Modules that run fused code now (or would, in a dry run), whether by this call or an earlier one."""
        return self._in_state("patched", "already")

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """Modules that a rule knows but that were left as they are, with the reason."""
        return self._in_state("skipped")

    @property
    def near_misses(self) -> tuple[Entry, ...]:
        """Modules whose class name is known but whose code differs from what the rule was checked with."""
        return self._in_state("near_miss")

    def __bool__(self) -> bool:
        return bool(self.patched)

    def undo(self) -> int:
        """Unpatch what this call patched; what an earlier call had patched stays. Returns the number of modules.

        Raises:
            PatchError: a module was re-classed after patching; nothing is undone then.
        """
        from vidkernels.patching._api import undo_all

        modules = [module for module in (reference() for reference in self._changed) if module is not None]
        return undo_all([(type(m).__name__, m) for m in modules if isinstance(m, _mechanism.PatchTag)])

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str, str, str], int] = {}
        for entry in self.entries:
            reason = entry.reason.partition(";")[0]
            key = (entry.state, entry.cls, entry.op, entry.backend, reason)
            groups[key] = groups.get(key, 0) + 1
        order = {"patched": 0, "already": 1, "near_miss": 2, "skipped": 3}
        verbs = {"patched": "would be patched" if self.dry_run else "patched", "near_miss": "near miss"}
        lines = []
        for (state, cls, op, backend, reason), count in sorted(groups.items(), key=lambda item: order[item[0][0]]):
            target = f" → {op} ({backend})" if state in ("patched", "already") else f" ({op})"
            lines.append(f"{verbs.get(state, state):<10} {count:>4} × {cls}{target}{': ' + reason if reason else ''}")
        if len(lines) > _LINES - 2:
            lines = [*lines[: _LINES - 3], f"... {len(lines) - _LINES + 3} more groups; see .details()"]
        if self.batched:
            lines.append(f"batched    {self.batched:>4} projections of modulation")
        if self.numerics:
            lines += self._verified()
        return "\n".join(lines) if lines else "nothing to patch: no rule knows a module of this model"

    def _verified(self) -> list[str]:
        judged = [item for item in self.numerics if item.rule != WHOLE]
        lines = [f"verified   {len(judged):>4} comparisons with float64"]
        if judged:
            worst = max(judged, key=lambda n: n.error_patched / n.allowed if n.allowed else 0.0)
            lines[0] += f"; closest to its limit: {worst}"
        return lines + [f"{item.rule}: {item}" for item in self.numerics if item.rule == WHOLE]

    def details(self) -> str:
        """Every entry on its own line, then every numeric comparison."""
        lines = []
        for entry in self.entries:
            names = ", ".join((entry.name or "(model)", *entry.aliases))
            tail = f": {entry.reason}" if entry.reason else ""
            lines.append(f"{entry.state:<9} {names} [{entry.cls}] {entry.rule} ({entry.backend}){tail}")
        return "\n".join([*lines, *(str(item) for item in self.numerics)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for logs and JSON."""
        return {
            "dry_run": self.dry_run,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
            "numerics": [dataclasses.asdict(item) for item in self.numerics],
        }


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a model: `patched` is `all`, `some`, `none` or `irregular`.

    `irregular` means that a patched module does not run its fused forward or cannot be unpatched: it was re-classed
    after patching, or its instance got a `forward` of its own. `remarks` names such modules, stacks of
    `batch_modulation` that are not used at present, and unpatched candidates.
    """

    patched: str
    ops: dict[str, int]
    backends: dict[str, int]
    fallbacks: dict[str, int]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        def listing(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} × {count}" for name, count in sorted(counts.items())) or "none"

        lines = [f"patched: {self.patched}", f"ops: {listing(self.ops)}", f"backends: {listing(self.backends)}"]
        lines.append(f"fallbacks: {listing(self.fallbacks)}")
        return "\n".join([*lines, *self.remarks[: _LINES - 4]])
