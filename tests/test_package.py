# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: silent and cheap import, the same stem in every room, files a reader can hold, ENV.md."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from helpers import ROOT, run_python

from vidkernels import _env

STEMS = sorted(
    path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name not in ("common", "__pycache__")
)
ROOMS = {
    "reference": "python_ref/{}.py",
    "Triton": "vidkernels/triton/{}.py",
    "test": "tests/test_{}.py",
    "benchmark": "benchmarks/bench_{}.py",
    "page": "docs/{}.md",
    "kernels": "csrc/{}",
}
# Ops that run on the kernels of a stem, or on several.
SERVED = ("axial_attention", "entropy", "group_norm", "upsample_conv3d")
# Ops of a stem with a file of their own in `ops/`, where one file would pass 400 lines; all else lies under the stem.
PARTS = {
    "adaln_modulate": "adaln_zero", "gate_residual": "adaln_zero", "alpha_blend_fold": "alpha_blend",
    "downsample_conv3d": "upsample_conv3d",
}  # fmt: skip
SOURCES = sorted(
    p for folder in ("vidkernels", "python_ref", "csrc", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)
# Floors of DESIGN: a module may import from its own floor or below.
FLOORS = {
    "_commands": 6,
    "training": 5, "patching": 5, "models": 4, "nn": 3, "sampling": 3, "caching": 3, "packing": 3, "distributed": 3,
    "ops": 2, "dispatch": 1, "triton": 0, "errors": 0, "_env": 0, "_library": 0, "_reference": 0,
}  # fmt: skip


def test_every_stem_is_built() -> None:
    (stems,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "csrc" / "build.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "STEMS"
    )
    assert sorted(stems) == STEMS


@pytest.mark.parametrize(
    ("stem", "room"),
    [(stem, room) for stem in STEMS for room in ROOMS]
    + [(op, room) for op in SERVED for room in ROOMS if room not in ("Triton", "kernels")],
)
def test_every_stem_is_in_every_room(stem: str, room: str) -> None:
    path = ROOT / ROOMS[room].format(stem)
    assert path.exists(), f"{stem} has no {room}: {path.relative_to(ROOT)}"


def test_every_public_file_of_ops_is_a_stem_or_a_part_of_one() -> None:
    files = {path.stem for path in (ROOT / "vidkernels" / "ops").glob("[!_]*.py")}
    assert files == {*STEMS, *SERVED, *PARTS} and set(PARTS.values()) <= {*STEMS, *SERVED}


def test_import_is_silent_cheap_and_touches_no_gpu() -> None:
    code = (
        "import time, sys, torch; start = time.perf_counter(); import vidkernels; took = time.perf_counter() - start\n"
        "assert 'triton' not in sys.modules or 'vidkernels.triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized(); print(f'{took * 1000:.1f}')"
    )
    times = [float(run_python(code)) for _ in range(3)]
    assert min(times) < 50, f"import takes {times} ms beyond torch"


def test_log_goes_to_stderr_where_the_variable_asks_for_it() -> None:
    code = (
        "import sys, warnings, torch; warnings.simplefilter('ignore'); sys.stderr = sys.stdout\n"
        "from vidkernels import ops; ops.fsq_quantize(torch.zeros(2, 3), [8, 5, 5])"
    )
    silent = {"VIDKERNELS_SKIP_LIBRARY": "1"}
    assert run_python(code, env=silent) == ""
    said = run_python(code, env={**silent, "VIDKERNELS_LOG": "info"})
    assert said.startswith("vidkernels INFO: fsq_quantize runs on the reference backend.")
    wrong = "VIDKERNELS_LOG: expected one of debug, info, warning, error, got 'loud'."
    with pytest.raises(AssertionError, match=wrong):
        run_python("import vidkernels", env={"VIDKERNELS_LOG": "loud"})


def test_ops_import_without_triton_and_print_nothing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import vidkernels.ops as ops, vidkernels.nn as nn\n"
        "for name in ops.__all__: getattr(ops, name)\n"
        "for name in nn.__all__: getattr(nn, name)\n"
    )
    assert run_python(code) == ""


def test_what_python_implements_is_not_taken_for_a_compiled_kernel() -> None:
    """A library built with `VIDKERNELS_OPS=fsq` has no attention: its op must say so instead of calling nothing."""
    code = (
        "from vidkernels import dispatch, ops\n"
        "for name in ops.__all__: getattr(ops, name)\n"
        "found = {d.facts.__module__ for d in dispatch.dispatchers().values() if 'cpp' in d.names}\n"
        "print(*sorted(m for m in found if dispatch._has_kernels(m, 'CPU') or dispatch._has_kernels(m, 'CUDA')))"
    )
    # These two look for the compiled op beneath their Python part in a check of their own.
    allowed = {"vidkernels.ops.causal_conv3d", "vidkernels.ops.upsample_conv3d"}
    assert set(run_python(code, env={"VIDKERNELS_SKIP_LIBRARY": "1"}).split()) <= allowed


def test_references_are_those_of_this_checkout() -> None:
    """An environment into which another checkout is installed must not lend its references."""
    from vidkernels._reference import fsq

    assert Path(fsq.__file__ or "").parent == ROOT / "python_ref"


def test_public_names_exist() -> None:
    import vidkernels

    for name in (
        "ops",
        "nn",
        "patch",
        "unpatch",
        "status",
        "explain",
        "patched",
        "unpatched",
        "rules",
        "register_rule",
    ):
        assert getattr(vidkernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'path'"):
        vidkernels.path  # noqa: B018


def test_env_page_is_the_table() -> None:
    assert (ROOT / "ENV.md").read_text() == _env.markdown()


def test_environment_is_read_in_one_place() -> None:
    pattern = re.compile(r"os\.environ|getenv\(")
    # _quiet.py sets two variables of torch before torch is loaded.
    allowed = {"vidkernels/_env.py", "vidkernels/_quiet.py", "csrc/build.py"}
    found = {str(p.relative_to(ROOT)) for p in SOURCES if p.parts[-2] != "benchmarks" and pattern.search(p.read_text())}
    assert found <= allowed, f"environment read outside _env.py: {sorted(found - allowed)}"


# Two Triton kernels, and a public function of which 60 lines are its docstring. The list may only shrink.
LONG_FUNCTIONS = {"qk_norm_rope", "_adaln_bwd_kernel", "_backward_side"}


def test_files_and_functions_stay_readable() -> None:
    long_files, long_functions = [], []
    for path in SOURCES + sorted((ROOT / "tests").glob("*.py")):
        text = path.read_text()
        if text.count("\n") > 400:
            long_files.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.name in LONG_FUNCTIONS:
                continue
            if (node.end_lineno or 0) - node.lineno > 80:
                long_functions.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long_files, long_files
    assert not long_functions, long_functions


def _floor(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "vidkernels" or len(parts) < 2:
        return None
    return FLOORS.get(parts[1])


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "vidkernels")], ids=lambda p: p.stem)
def test_no_import_runs_upwards(path: Path) -> None:
    own = _floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            floor = _floor(module)
            assert floor is None or floor <= own, f"{path.relative_to(ROOT)} imports {module} from above"


@pytest.mark.parametrize("path", sorted((ROOT / "python_ref").glob("*.py")), ids=lambda p: p.stem)
def test_references_import_only_torch(path: Path) -> None:
    allowed = {
        "__future__",
        "torch",
        "math",
        "typing",
        "collections",
        "functools",
        "itertools",
        "dataclasses",
        "python_ref",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            assert node.module.split(".")[0] in allowed


def test_every_source_names_its_licence() -> None:
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h")
    folders = ("vidkernels", "python_ref", "csrc", "tests", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    missing = [
        str(p.relative_to(ROOT)) for p in files if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]
    ]
    assert not missing, missing


def _names_for_type_checkers(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    names |= {alias.asname or alias.name for alias in line.names}
                elif isinstance(line, ast.Assign):
                    names |= {target.id for target in line.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "__init__.py" and "_EXPORTS" in p.read_text()], ids=lambda p: p.parent.name
)
def test_lazy_names_are_known_to_type_checkers(path: Path) -> None:
    """Otherwise `ops.causal_conv3d(x, w)` is an error in a user's checked code: the module of that name is not callable."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
    lazy = {*module._EXPORTS, *getattr(module, "_SUBPACKAGES", ())}
    assert _names_for_type_checkers(ast.parse(path.read_text())) == lazy
