# SPDX-License-Identifier: Apache-2.0
"""Which rule fits a module: by class and unchanged forward, or, for vendored copies, by the digests of its methods.

A class name alone never matches. A name with other code is a near miss: reported, not patched.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from vidkernels.patching import _guard, _mechanism
from vidkernels.patching._rule import Rule

_DIGESTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_OTHER_DIGESTS = "; the package's digests are those of Python 3.11 and later" if sys.version_info < (3, 11) else ""


@dataclass(frozen=True)
class Match:
    """A rule that fits a module by `anchor`, the upstream class; or does not: `reason` says why.

    state: "match", "refused" (the user can repair it if `repairable`) or "near_miss".
    """

    rule: Rule
    state: str
    anchor: type | None = None
    reason: str = ""
    repairable: bool = False


def digest(function: Any) -> str:
    """Digest of a function's code, blind to comments, docstring, annotations and layout.

    Taken from the source, for bytecode differs between Python versions: equal from Python 3.11 on (3.10 writes tuples
    otherwise). Without a source the answer is an empty string.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        return ""
    known = _DIGESTS.get(function)
    if known is None:
        known = _DIGESTS[function] = _source_digest(function)
    return known


def _source_digest(function: FunctionType) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # no source file (REPL, frozen): nothing to compare, so never a match
        return ""
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    tree.decorator_list, tree.returns, tree.name = [], None, "f"
    for argument in [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg]:
        if argument is not None:
            argument.annotation = None
    if tree.body and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        tree.body = tree.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def candidates(cls: type, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules that have a target which modules of a class may stand for: asked once a class, since there are hundreds of rules."""
    return tuple(rule for rule in rules if any(_anchor(cls, target) is not None for target in rule.targets))


def find(module: nn.Module, rules: tuple[Rule, ...], sharded: bool = False) -> Match | None:
    """The first rule that matches; else the first refusal or near miss; None if no rule knows this kind of module.

    `sharded`: FSDP2 gathers this module's parameters before its forward, so DTensors at rest are no obstacle.
    """
    first: Match | None = None
    for rule in rules:
        match = _match(module, rule, sharded)
        if match is not None and match.state == "match":
            return match
        first = first or match
    return first


def _match(module: nn.Module, rule: Rule, sharded: bool) -> Match | None:
    for target in rule.targets:
        anchor = _anchor(type(module), target)
        if anchor is None or not all(_has(module, name) for name in rule.features):
            continue
        if getattr(type(module), "forward", None) is not getattr(anchor, "forward", None):
            reason = f"{type(module).__name__} overrides {anchor.__name__}.forward"
            return Match(rule, "refused", reason=reason)
        difference = _difference(anchor, rule)
        if difference is not None:
            return Match(rule, "near_miss", reason=difference)
        refusal = _override_reason(module, anchor, rule) or _check_reason(module, rule)
        refusal = refusal or _parameter_reason(module, rule, sharded)
        if refusal is not None:
            return Match(rule, "refused", anchor, refusal)
        repair = _repairable_reason(module, rule)
        if repair is not None:
            return Match(rule, "refused", anchor, repair, repairable=True)
        return Match(rule, "match", anchor)
    return None


def _override_reason(module: nn.Module, anchor: type, rule: Rule) -> str | None:
    """Which method of a subclass or of the instance would be bypassed: one that the rule's digests pin, or its mixin has."""
    keys = (key.partition(".") for key in rule.digests)
    names = {method for name, _, method in keys if name == anchor.__name__}
    names.update(
        name for base in rule.mixin.__mro__ if base not in nn.Module.__mro__ for name in vars(base) if name[:2] != "__"
    )
    for name in sorted(names - {"", "forward"}):
        upstream = inspect.getattr_static(anchor, name, None)
        if upstream is None:
            continue
        if name in vars(module):
            return f"its instance has its own `{name}`, which the patch would bypass"
        if inspect.getattr_static(type(module), name) is not upstream:
            return f"{type(module).__name__} overrides {anchor.__name__}.{name}, which the patch would bypass"
    return None


def _check_reason(module: nn.Module, rule: Rule) -> str | None:
    """What the rule's own check says; it reads layers as upstream builds them, which wrappers (LoRA's) are not."""
    try:
        return rule.check(module) if rule.check else None
    except AttributeError as error:
        return f"its layers are not as upstream builds them ({error}); patch before they are wrapped or replaced"


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute, or, for a dotted name, such a descendant; behind `!`, whether it has none."""
    if name.startswith("!"):
        return not _has(module, name[1:])
    return hasattr(module, name) if "." not in name else descendant(module, name) is not None


def _anchor(cls: type, target: str) -> type | None:
    """The upstream class that a module of class `cls` stands for: the target itself, or a class of that name in another file."""
    path, _, name = target.partition(":")
    known = getattr(sys.modules.get(path), name, None)
    if isinstance(known, type) and issubclass(cls, known):
        return known
    for base in cls.__mro__:
        if base.__module__.startswith("vidkernels."):  # our own models run on the ops already
            return None
        if base.__name__ == name and not _mechanism.is_patched_class(base):
            return base
    return None


def _difference(anchor: type, rule: Rule) -> str | None:
    """How the code that a rule stands in for differs from what the rule knows, or None."""
    home = sys.modules.get(anchor.__module__)
    if not rule.digests:
        known = any(
            getattr(sys.modules.get(t.partition(":")[0]), t.partition(":")[2], None) is anchor for t in rule.targets
        )
        return None if known else f"only the name {anchor.__name__} fits; rule {rule.name} has no digest to compare"
    for key, accepted in rule.digests.items():
        class_name, _, method = key.partition(".")
        owner = anchor if class_name == anchor.__name__ else getattr(home, class_name, None)
        found = digest(getattr(owner, method, None) if method else owner)
        if found not in accepted:
            what = f"{anchor.__module__}.{key}"
            state = f"has digest {found}" if found else "is missing or has no source"
            tested = f" (tested: {', '.join(rule.tested_versions)})" if rule.tested_versions else ""
            known_here = f"rule {rule.name} knows {', '.join(accepted)}{tested}{_OTHER_DIGESTS}"
            return f"{what} {state}, {known_here}; register_rule accepts a copy that you checked"
    return None


def _read_parameters(module: nn.Module, rule: Rule) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, child in _bypassed(module, rule):
        yield from ((f"{name}.{key}", parameter) for key, parameter in child.named_parameters(recurse=False))


def descendant(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of a dotted name, or None; wrappers that forward attributes are not looked through."""
    current: nn.Module | None = module
    for part in name.split("."):
        current = current._modules.get(part) if current is not None else None
    return current


def _parameter_reason(module: nn.Module, rule: Rule, sharded: bool) -> str | None:
    for name, child in _bypassed(module, rule):
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            return f"its child {name} is sharded on its own, so its weights are gathered only inside its own forward"
    for name, parameter in _read_parameters(module, rule):
        plain = _guard.is_plain(parameter) or (sharded and type(parameter).__name__ == "DTensor")
        if not plain:
            kind = type(parameter).__name__
            return f"parameter {name} is a {kind} (quantized or tensor parallel), kernels read plain tensors"
        if parameter.is_floating_point() and parameter.dtype not in rule.dtypes:
            return f"parameter {name} has dtype {str(parameter.dtype).removeprefix('torch.')}"
    return None


def _bypassed(module: nn.Module, rule: Rule) -> Iterator[tuple[str, nn.Module]]:
    """The descendants whose weights the fused forward reads without calling them."""
    if "*" in rule.reads:
        yield from ((name, child) for name, child in module.named_modules() if name)
        return
    for name in rule.reads:
        child = descendant(module, name)
        if child is not None:
            yield name, child


def _repairable_reason(module: nn.Module, rule: Rule) -> str | None:
    if _mechanism.own_forward(module):
        return (
            "its instance has its own `forward` (an offload or monitoring hook, or a MethodType patch), which would "
            "hide the patch; patch before installing it"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule; patch before torch.jit.script"
    for name, parameter in _read_parameters(module, rule):
        if parameter.device.type == "meta":
            return f"parameter {name} is on the meta device; patch after loading the weights and before offloading them"
    for name, child in _bypassed(module, rule):
        if _mechanism.own_forward(child):
            return f"its child {name} has its own `forward`, which would be bypassed; patch before installing it"
    return None
