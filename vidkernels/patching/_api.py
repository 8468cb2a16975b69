# SPDX-License-Identifier: Apache-2.0
"""`patch`, `unpatch`, `status`, `explain` and the two context managers."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from vidkernels.errors import OptionError, PatchError
from vidkernels.ops._checks import check_flags, check_option
from vidkernels.patching import _guard, _mechanism, _modulation, _verify
from vidkernels.patching._plan import Exclude, Plan, check_excluded, match_all, roots_of
from vidkernels.patching._report import Entry, PatchReport, Status
from vidkernels.patching._rule import check_backend, rules, select_rules

_UNKNOWN = "No rule knows any of its modules: print(vidkernels.rules()) lists what is known; strict=False accepts that."


def patch(
    model: Any,
    *,
    ops: str | Sequence[str] = "auto",
    exclude: Exclude = (),
    mode: Literal["auto", "inference", "training"] = "auto",
    backend: str | Mapping[str, str] = "auto",
    strict: bool = True,
    verify: Any = None,
    tolerance: Literal["default", "exact"] = "default",
    batch_modulation: bool = False,
    for_compile: bool = False,
    dry_run: bool = False,
) -> PatchReport:
    """Replace the forwards of known modules by fused ones, in place: same outputs, same `state_dict`, exact undo.

    Args:
        model: an `nn.Module`, or a pipeline whose `components` hold modules.
        ops: `"auto"`, or op or rule names out of `vidkernels.rules()`.
        exclude: globs on fully qualified names, or a predicate `(name, module) -> bool`.
        mode: `"auto"` serves training and inference; `"training"` leaves out rules without a backward; `"inference"`
            compares no gradients in `verify`.
        backend: `"auto"`, a backend's name (`"cpp"`, `"cuda"`, `"triton"`, `"reference"`, ...) for all ops that have it, or
            a mapping from op to backend.
        strict: raise if nothing matched, if a named op or an excluded name matched nothing, or if a module was refused for
            a reason that the caller can do something about. False: the report says so instead.
        verify: sample inputs of the model, `x`, `(x, y)`, `{...}` or `(args, kwargs)`, or True to try each matched module
            alone on synthetic inputs of its rule. If a module's error against float64 exceeds the promise (twice the
            original's error plus one rounding), nothing is patched. Modules that are patched already are judged, too.
        tolerance: `"default"`, or `"exact"` to demand equal bits from `verify`.
        batch_modulation: compute the shifts, scales and gates of all blocks in one product per step, where blocks share
            their condition. The layers' weights move into one storage; `state_dict` stays. It is used without gradients,
            autocast and tracing only.
        for_compile: the model will be compiled: leave out rules for short chains that Inductor fuses as well by itself,
            unless `ops` names them or the model trains. `explain` says which those are.
        dry_run: match only; the same as `vidkernels.explain(model)`.

    Returns:
        `PatchReport`; as a context manager it undoes the patch on exit.

    Raises:
        PatchError: see `strict` and `verify`; or the model is a `torch.compile` wrapper. The model is unchanged.
        OptionError: an argument outside its allowed values.
    """
    check_option("mode", mode, ("auto", "inference", "training"))
    verify = None if verify is False else verify
    check_option("tolerance", tolerance, ("default", "exact"))
    check_flags(strict=strict, batch_modulation=batch_modulation, for_compile=for_compile, dry_run=dry_run)
    check_backend(backend)
    selected = select_rules(ops)
    roots = roots_of(model)
    with _mechanism.LOCK:
        options = (roots, selected, exclude, mode, backend, for_compile and ops == "auto")
        plans, entries = match_all(*options)
        if dry_run:
            return PatchReport(tuple(_with_notes(entries)), dry_run=True)
        _refuse_compiled(roots)
        if strict:
            check_excluded(roots, exclude)
            _require(entries, plans, ops)
        numerics: list[_verify.Numerics] = []
        if verify is not None:
            # An earlier call's modules are judged, too: a user verifies when the results of a patched model look wrong.
            again = any(plan.already for plan in plans)
            with unpatched(model) if again else contextlib.nullcontext():
                originals = match_all(*options)[0] if again else plans
                numerics = _verify_alone(originals, roots, mode, tolerance, verify)
        batched = 0
        with _applied(plans):
            if batch_modulation:
                batched = _batch(plans, strict)
            if verify is not None and verify is not True:
                numerics += _verify_whole(model, roots, verify)
    changed = tuple(weakref.ref(plan.module) for plan in plans if not plan.already)
    return PatchReport(tuple(entries), tuple(numerics), batched=batched, _changed=changed)


def explain(model: Any, **options: Any) -> PatchReport:
    """What `patch(model, **options)` would do, module by module with reasons. Nothing is changed."""
    return patch(model, **{**options, "dry_run": True})


def unpatch(model: Any, *, ops: str | Sequence[str] = "all") -> int:
    """Undo `patch`: give every patched module (or those of the named ops or rules) its original class back.

    Returns:
        How many modules were unpatched.

    Raises:
        PatchError: something changed a module's class after patching (FSDP2, parametrizations); nothing is undone then.
    """
    names = None if ops == "all" else {rule.name for rule in select_rules(ops)}
    with _mechanism.LOCK:
        found = [
            (name, module)
            for root_name, root in roots_of(model)
            for module, (name, *_) in _mechanism.unique_modules(root, root_name).items()
            if isinstance(module, _mechanism.PatchTag) and (names is None or module._vidkernels_rule in names)
        ]
        return undo_all(found)


def undo_all(found: Sequence[tuple[str, nn.Module]], keep_batches: bool = False) -> int:
    """Undo named modules, all or none; their modulation is no longer projected in one product, unless `keep_batches`."""
    names = {module: name for name, module in found}  # components of a pipeline may share modules
    with _mechanism.LOCK:
        for module, name in names.items():
            if not _mechanism.is_patched(module):
                raise PatchError(
                    f"{name or '(model)'} was re-classed after patching ({type(module).__name__}); unpatch before "
                    f"fully_shard, or remove the parametrization first. Nothing was undone."
                )
        for module in names:
            _mechanism.undo(module)
        if not keep_batches:
            _modulation.dissolve(names)
    return len(names)


def status(model: Any) -> Status:
    """How much of a model is patched, with which backends, and which calls fell back to the original forward."""
    ops: Counter[str] = Counter()
    backends: Counter[str] = Counter()
    fallen: Counter[str] = Counter()
    irregular: list[str] = []
    open_: list[str] = []
    roots = roots_of(model)
    for root_name, root in roots:
        for module, (name, *_) in _mechanism.unique_modules(root, root_name).items():
            if not isinstance(module, _mechanism.PatchTag):
                continue
            ops.update(module._vidkernels_ops)
            backends.update(getattr(module, _mechanism.BACKEND_PREFIX + op, "auto") for op in module._vidkernels_ops)
            fallen.update(_guard.fallbacks(module))
            irregular += _irregularities(name or "(model)", module)
    plans, _ = match_all(roots, rules(), (), "auto", "auto")
    open_ = [
        f"not patched: {plan.name or '(model)'} could be by {plan.rule.name}" for plan in plans if not plan.already
    ]
    word = "irregular" if irregular else "none" if not ops else "some" if open_ else "all"
    stacks = _modulation.remarks(root for _, root in roots)
    return Status(word, dict(ops), dict(backends), dict(fallen), (*irregular, *stacks, *(open_ if ops else [])))


def _irregularities(name: str, module: nn.Module) -> list[str]:
    found = []
    if not _mechanism.is_patched(module):
        ours: Any = next(cls for cls in type(module).__mro__ if _mechanism.is_patched_class(cls))
        state = "runs its fused forward" if type(module).forward is ours.forward else "has another forward"
        kind = type(module).__name__
        found.append(
            f"irregular: {name} was re-classed after patching ({kind}): it {state}, and cannot be unpatched now"
        )
    if _mechanism.own_forward(module):
        found.append(f"irregular: {name} got a `forward` of its own after patching, which may hide the fused one")
    return found


@contextlib.contextmanager
def patched(model: Any, **options: Any) -> Iterator[PatchReport]:
    """`with vidkernels.patched(model):` patches for the block; modules that were patched before stay so."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        report.undo()


@contextlib.contextmanager
def unpatched(model: Any) -> Iterator[None]:
    """`with vidkernels.unpatched(model):` restores the original classes for the block, then patches the same modules
    again with the same backends. For example to `torch.save` a model for a machine without vidkernels."""
    with _mechanism.LOCK:
        saved = [
            (name, module, type(module), _mechanism.backends(module) if _mechanism.is_patched(module) else {})
            for root_name, root in roots_of(model)
            for module, (name, *_) in _mechanism.unique_modules(root, root_name).items()
            if isinstance(module, _mechanism.PatchTag)
        ]
        undo_all([(name, module) for name, module, _, _ in saved], keep_batches=True)
        stacks = _modulation.set_aside(module for _, module, _, _ in saved)
    try:
        yield
    finally:
        with _mechanism.LOCK:
            _modulation.put_back(stacks)
            for _, module, cls, backends in saved:
                _mechanism.apply(module, cls, backends)


def _refuse_compiled(roots: Sequence[tuple[str, nn.Module]]) -> None:
    for name, root in roots:
        if _mechanism.is_compiled_wrapper(root):
            raise PatchError(
                f"{name or 'the model'} is the wrapper that torch.compile returned; call vidkernels.patch first and "
                f"torch.compile afterwards (or patch model._orig_mod and compile again)."
            )


def _require(entries: Sequence[Entry], plans: Sequence[Plan], ops: str | Sequence[str]) -> None:
    """The checks of `strict=True`."""
    broken = [entry for entry in entries if entry.repairable]
    if broken:
        entry = broken[0]
        raise PatchError(
            f"{entry.name or '(model)'} ({entry.cls}) cannot be patched: {entry.reason}. "
            f"{len(broken)} such module(s); strict=False leaves them out."
        )
    if not plans:
        known = "; ".join(f"{entry.name or '(model)'}: {entry.state}, {entry.reason}" for entry in entries[:5])
        if not known and ops != "auto":
            known = f"No rule for ops={ops!r} knows any of its modules; ops='auto' tries all rules."
        raise PatchError(f"nothing in this model was patched. {known or _UNKNOWN}")
    if ops != "auto":
        for name in [ops] if isinstance(ops, str) else ops:
            if not any(name in (*plan.rule.ops, plan.rule.name) for plan in plans):
                raise PatchError(f"ops: {name!r} matched nothing in this model; strict=False accepts that.")


@contextlib.contextmanager
def _applied(plans: Sequence[Plan]) -> Iterator[None]:
    """Re-class the modules; where the block fails, everything is as it was."""
    earlier = [(plan.module, _mechanism.backends(plan.module)) for plan in plans if plan.already]
    _apply(plans)
    try:
        yield
    except BaseException:
        undo_all([(plan.name, plan.module) for plan in plans if not plan.already])
        for module, backends in earlier:
            _mechanism.set_backends(module, backends)
        raise


def _apply(plans: Sequence[Plan]) -> None:
    """Re-class all modules, or none if one cannot be."""
    done: list[Plan] = []
    try:
        for plan in plans:
            if plan.already:
                continue
            done.append(plan)
            _mechanism.apply(plan.module, plan.make_class(), plan.backends)
            _guard.forget_fallbacks(plan.module)
    except BaseException:
        for plan in done:
            if _mechanism.is_patched(plan.module):
                _mechanism.undo(plan.module)
        raise
    for plan in plans:
        if plan.already:
            _mechanism.set_backends(plan.module, plan.backends)


def _batch(plans: Sequence[Plan], strict: bool) -> int:
    """Stack the modulation projections of all blocks; how many."""
    layers = [layer for plan in plans if plan.rule.projections for layer in plan.rule.projections(plan.module)]
    found = _modulation.batch(layers)
    if strict and not any(_modulation.is_batched(layer) for layer in layers):
        raise PatchError(
            "batch_modulation: no two blocks of this model project one condition by plain layers; strict=False accepts that."
        )
    return found


def _with_notes(entries: Sequence[Entry]) -> list[Entry]:
    """Entries that would be patched say where Inductor alone would be as good."""
    notes = {rule.name: rule.inductor for rule in rules() if rule.inductor}
    return [
        dataclasses.replace(entry, reason=f"Inductor alone would be as good: {notes[entry.rule]}")
        if entry.state == "patched" and entry.rule in notes
        else entry
        for entry in entries
    ]


def _verify_alone(
    plans: Sequence[Plan], roots: Sequence[tuple[str, nn.Module]], mode: str, tolerance: str, verify: Any
) -> list[_verify.Numerics]:
    """Compare one module per distinct (class, rule, parameter shapes) on copies; raise on a broken promise."""
    chosen: dict[Any, Plan] = {}
    for plan in plans:
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in plan.module.named_parameters())
        chosen.setdefault((type(plan.module), plan.rule.name, shapes), plan)
    inputs = _inputs(list(chosen.values()), roots, verify)
    results: list[_verify.Numerics] = []
    for plan in chosen.values():
        if plan.module not in inputs:
            continue
        backward = plan.rule.backward and (mode == "training" or (mode == "auto" and plan.module.training))
        found, rule = inputs[plan.module], plan.rule
        subject = _verify.Subject(
            *(plan.name, plan.module, plan.make_class(), plan.backends, rule.name, found, rule.widen, rule.result)
        )
        results += _verify.compare(subject, backward=backward, exact=tolerance == "exact")
    broken = [result for result in results if not result.ok]
    if broken:
        outputs = [result for result in broken if result.what.startswith("output")]
        raise _verify.failure(max(outputs or broken, key=lambda n: n.error_patched / (n.allowed or 1.0)))
    return results


def _inputs(
    plans: list[Plan], roots: Sequence[tuple[str, nn.Module]], verify: Any
) -> Mapping[nn.Module, _verify.Inputs]:
    if verify is True:
        for plan in plans:
            if plan.rule.sample is None:
                raise PatchError(
                    f"verify=True: rule {plan.rule.name} has no synthetic inputs; pass sample inputs of the model."
                )
        drawn = {plan.module: _verify.synthetic(plan.module, plan.rule.sample) for plan in plans if plan.rule.sample}
        return {module: inputs for module, inputs in drawn.items() if inputs is not None}
    if len(roots) != 1:
        raise OptionError(
            "verify", "True for a pipeline", "sample inputs", "Verify each component with its own inputs."
        )
    _, seen = _verify.capture(roots[0][1], _verify.normalise(verify), [plan.module for plan in plans])
    return seen


def _verify_whole(model: Any, roots: Sequence[tuple[str, nn.Module]], verify: Any) -> list[_verify.Numerics]:
    """Run the whole patched model beside the original one: structure must agree, the difference is reported."""
    inputs = _verify.normalise(verify)
    root = roots[0][1]
    actual, _ = _verify.capture(root, inputs, [])
    with unpatched(model):
        expected, _ = _verify.capture(root, inputs, [])
    return _verify.whole(type(root).__name__, expected, actual, inputs)
