# SPDX-License-Identifier: Apache-2.0
"""Walk a model and decide, module by module, what `patch` will do. Nothing is changed here."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vidkernels.errors import OptionError, PatchError
from vidkernels.patching import _mechanism
from vidkernels.patching._match import Match, candidates, find
from vidkernels.patching._report import Entry, backend_label
from vidkernels.patching._rule import Rule, backend_of, rules

Exclude = Sequence[str] | str | Callable[[str, nn.Module], bool]


@dataclasses.dataclass
class Plan:
    """One module that a rule matches: what it is now and what it becomes."""

    module: nn.Module
    name: str
    rule: Rule
    base: type
    anchor: type
    backends: dict[str, str]
    already: bool = False

    def make_class(self) -> type:
        """The class that the module becomes. Made only to patch: a plan leaves everything as it was."""
        rule = self.rule
        return _mechanism.patched_class(self.base, rule.mixin, rule.name, rule.ops, self.anchor)


def roots_of(model: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        return [("", model)]
    components = getattr(model, "components", None)
    if isinstance(components, Mapping):
        return [(name, part) for name, part in components.items() if isinstance(part, nn.Module)]
    raise OptionError("model", "a torch.nn.Module or a pipeline with `components`", type(model).__name__)


def _excluder(exclude: Exclude) -> Callable[[str, nn.Module], bool]:
    if callable(exclude):
        return exclude
    globs = (exclude,) if isinstance(exclude, str) else tuple(exclude) if isinstance(exclude, Iterable) else (None,)
    if not all(isinstance(glob, str) for glob in globs):
        raise OptionError("exclude", "patterns of module names, or a function (name, module) -> bool", repr(exclude))
    return lambda name, module: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def check_excluded(roots: Sequence[tuple[str, nn.Module]], exclude: Exclude) -> None:
    """Every excluded pattern names a module: a misspelt one would leave in what was to be left out.

    Raises:
        PatchError: a pattern that matches nothing, with the nearest name.
    """
    if callable(exclude):
        return
    modules = [_mechanism.unique_modules(root, root_name) for root_name, root in roots]
    names = [name for found in modules for all_names in found.values() for name in all_names]
    for glob in [exclude] if isinstance(exclude, str) else exclude:
        if not fnmatch.filter(names, glob):
            close = difflib.get_close_matches(glob, names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise PatchError(f"exclude: {glob!r} matches no module of this model.{hint} strict=False accepts that.")


def match_all(
    roots: Sequence[tuple[str, nn.Module]],
    selected: tuple[Rule, ...],
    exclude: Exclude,
    mode: str,
    backend: str | Mapping[str, str],
    left_to_inductor: bool = False,
) -> tuple[list[Plan], list[Entry]]:
    """Plans for the modules that match and an entry for every module that a rule knows.

    `left_to_inductor`: rules whose chain Inductor fuses as well by itself are left out, unless gradients are wanted.
    """
    excluded = _excluder(exclude)
    plans: list[Plan] = []
    entries: list[Entry] = []
    by_class: dict[type, tuple[Rule, ...]] = {}
    for root_name, root in roots:
        modules = _mechanism.unique_modules(root, root_name)
        sharded = {id(m) for top in modules if _is_fsdp(top) for m in top.modules()}
        compiled = {id(m) for top in modules if _mechanism.is_compiled_wrapper(top) for m in top.modules()}
        subsuming: dict[str, str] = {}
        for module, names in modules.items():
            cls = type(module)
            if cls not in by_class and not isinstance(module, _mechanism.PatchTag):
                by_class[cls] = candidates(cls, selected)
            match = _find(module, by_class.get(cls, selected), id(module) in sharded)
            if match is None:
                entries += _scripted(module, names, selected, backend, entries)
                continue
            plan, state, reason = _decide(module, names, match, backend)
            repairable = match.repairable
            above = [_above(name, subsuming) for name in names]
            if all(above):
                plan, state, reason, repairable = None, "skipped", f"subsumed by {above[0]}", False
            elif excluded(names[0], module):
                plan, state, reason, repairable = None, "skipped", "excluded by the caller", False
            elif plan is not None and left_to_inductor and match.rule.inductor and not _trains(module, mode):
                plan, state, reason = None, "skipped", f"left to Inductor: {match.rule.inductor}"
            elif plan is not None and mode == "training" and not match.rule.backward:
                plan, state, reason = None, "skipped", "the rule has no backward and mode is 'training'"
            elif plan is not None and id(module) in compiled and not plan.already:
                plan, state, repairable = None, "skipped", True
                reason = "it is inside a torch.compile wrapper; patch before torch.compile"
            if plan is not None:
                plans.append(plan)
                if match.rule.subsumes:
                    subsuming.update((name, f"{name or '(model)'} ({match.rule.name})") for name in names)
            label = backend_label(backend_of(backend, match.rule))
            entry = Entry(names[0], cls.__name__, match.rule.label, match.rule.name, label, state, reason)
            entries.append(dataclasses.replace(entry, aliases=tuple(names[1:]), repairable=repairable))
    return plans, entries


_SCRIPTED = "it is a ScriptModule"


def _scripted(
    module: nn.Module,
    names: Sequence[str],
    selected: tuple[Rule, ...],
    backend: str | Mapping[str, str],
    before: Sequence[Entry],
) -> list[Entry]:
    """An entry for the outermost of the modules that torch.jit made of those that rules know by name, as in checkpoints of TorchScript."""
    if not isinstance(module, torch.jit.ScriptModule):
        return []
    if any(entry.reason.startswith(_SCRIPTED) and _above(names[0], {entry.name: "it"}) for entry in before):
        return []
    cls = getattr(module, "original_name", "")
    rule = next((rule for rule in selected if _could_be(module, cls, rule)), None)
    if rule is None:
        return []
    reason = f"{_SCRIPTED}; load its weights into the model's own code (load_state_dict, strict=False) and patch that"
    return [Entry(names[0], cls, rule.label, rule.name, backend_label(backend_of(backend, rule)), "skipped", reason)]


def _could_be(module: nn.Module, cls: str, rule: Rule) -> bool:
    if not any(target.partition(":")[2] == cls for target in rule.targets):
        return False
    return all(_reaches(module, name.split(".")) for name in rule.features if name[:1] != "!")


def _reaches(module: Any, path: Sequence[str]) -> bool:
    for part in path:
        module = getattr(module, part, None)
        if module is None:
            return False
    return True


def _find(module: nn.Module, selected: tuple[Rule, ...], sharded: bool) -> Match | None:
    if isinstance(module, _mechanism.PatchTag):
        rule = next((rule for rule in rules() if rule.name == module._vidkernels_rule), None)
        if rule is None or rule not in selected:
            return None
        # Registered again with other ops: the module runs those that it was patched with.
        rule = dataclasses.replace(rule, ops=module._vidkernels_ops) if rule.ops != module._vidkernels_ops else rule
        return Match(rule, "already", module._vidkernels_anchor)
    return find(module, selected, sharded)


def _decide(
    module: nn.Module, names: list[str], match: Match, backend: str | Mapping[str, str]
) -> tuple[Plan | None, str, str]:
    """(plan, state, reason) of a module before exclusion and subsumption."""
    rule = match.rule
    wanted = backend_of(backend, rule)
    if match.state == "already" and match.anchor is not None:
        current = {op: getattr(module, _mechanism.BACKEND_PREFIX + op, "auto") for op in rule.ops}
        changed = (
            "" if current == wanted else f"backend changed from {backend_label(current)} to {backend_label(wanted)}"
        )
        return Plan(module, names[0], rule, type(module), match.anchor, wanted, already=True), "already", changed
    if match.state == "match" and match.anchor is not None:
        return Plan(module, names[0], rule, type(module), match.anchor, wanted), "patched", ""
    if match.state == "near_miss":
        return None, "near_miss", match.reason
    return None, "skipped", match.reason


def _above(name: str, subsuming: Mapping[str, str]) -> str:
    """The subsuming module strictly above a name, or an empty string."""
    while name:
        name = name.rpartition(".")[0]
        if name in subsuming:
            return subsuming[name]
    return ""


def _trains(module: nn.Module, mode: str) -> bool:
    """Whether a backward is wanted: published figures put Inductor's for a norm at 40 to 45 % of an H100's bandwidth."""
    return mode == "training" or (mode == "auto" and module.training)


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
