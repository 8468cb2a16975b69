# SPDX-License-Identifier: Apache-2.0
"""README and docs taken literally: Python blocks run, commands and their options exist, so do files, names and variables,
and every public name is on the page of the interface."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import api_page
import docs_context
import pytest
from helpers import ROOT
from test_package import SERVED, STEMS

from benchmarks import report
from vidkernels import __main__ as cli
from vidkernels import _env

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PREFIXES = ("ops", "nn", "packing", "caching", "sampling", "models", "training", "distributed", "vidkernels")


class Block(NamedTuple):
    """A fenced block: where it stands and what is in it."""

    where: str
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    name = page.relative_to(ROOT).as_posix()
    numbers: dict[str, int] = {}
    result = []
    for match in found:
        number = numbers[match[1]] = numbers.get(match[1], 0) + 1
        result.append(Block(f"{name} {number}", match[1], match[2], text.count("\n", 0, match.start()) + 1))
    return result


PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
COMMANDS = [
    (block.where, line.partition(" #")[0].strip())
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_no_context_is_left_over() -> None:
    named = {block.where for block in PYTHON}
    assert set(docs_context.CONTEXTS) <= named
    assert set(docs_context.NOT_RUN) <= named
    assert not set(docs_context.CONTEXTS) & set(docs_context.NOT_RUN)


@pytest.mark.parametrize("block", [b for b in PYTHON if b.where not in docs_context.NOT_RUN], ids=lambda b: b.where)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, check = docs_context.CONTEXTS.get(block.where, (lambda patch, folder: {}, None))
    names: dict[str, Any] = {"__name__": "docs", **make(monkeypatch, tmp_path)}
    page = ROOT / block.where.split()[0]
    code = compile("\n" * block.line + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
        if check is not None:
            check(names)


def options(*command: str) -> set[str]:
    """Options in the help of `python -m <command>`."""
    module = importlib.import_module(f"{command[0]}.__main__")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        module.main([*command[1:], "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue()))


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where}: {line[:40]}" for where, line in COMMANDS])
def test_commands_and_their_options_exist(where: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return
    if "-m" not in words:
        assert words[0] in {"pip", "uv", "pytest"}, f"{where}: nothing here knows how to check {line!r}"
        return
    words = words[words.index("-m") + 1 :]
    stop = next((i for i, word in enumerate(words) if i and not re.fullmatch(r"[a-z]+", word)), len(words))
    commands = words[: min(stop, 3 if words[1] in {"bench", "train", "peers"} else 2)]
    stated = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert stated <= options(*commands), f"{where}: {line}"


def anchors(page: Path) -> set[str]:
    """Names that a page's headings get."""
    headings = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
        for text in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_files_exist() -> None:
    missing = []
    folders = "|".join(("vidkernels", "python_ref", "csrc", "tests", "benchmarks", "docs"))
    for page in PAGES:
        text = page.read_text()
        targets = [(page.parent, link) for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
        targets += [(ROOT, path) for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)]
        missing += [f"{page.name}: {target}" for base, target in targets if not (base / target).exists()]
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            if anchor not in anchors(page.parent / link if link else page):
                missing.append(f"{page.name}: {link}#{anchor}")
    made_by_commands = {"benchmarks/results/"}
    assert not [item for item in missing if item.partition(": ")[2] not in made_by_commands]


SECTIONS = (
    "Maths", "Shapes and dtypes", "Numbers", "Gradients", "Streaming", "Modules", "Backends", "How it is fast", "Measured", "Limits",
)  # fmt: skip
OP_PAGES = re.findall(r"^\| \[(\w+)\]\(\1\.md\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)


def test_index_lists_every_page() -> None:
    links = set(re.findall(r"\]\(([\w]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert links == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(OP_PAGES) == sorted({*STEMS, *SERVED})


@pytest.mark.parametrize("name", OP_PAGES)
def test_pages_of_ops_have_the_same_sections_in_the_same_order(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    found = [heading for heading in re.findall(r"^## (.+)$", text, re.MULTILINE) if heading in SECTIONS]
    assert found == sorted(found, key=SECTIONS.index)
    assert {"Maths", "Numbers", "Backends", "Measured"} <= {*found}
    assert "```python" in text and f"{report.README_BEGIN}\n|" in text, "python -m benchmarks report FOLDER --docs docs"


def test_variables_exist() -> None:
    known = {variable.name for variable in _env.VARIABLES}
    for page in PAGES:
        stated = set(re.findall(r"\bVIDKERNELS_[A-Z_]+\b", page.read_text()))
        assert stated <= known, f"{page.name}: {sorted(stated - known)}"


def test_every_command_is_described() -> None:
    text = " ".join(page.read_text() for page in PAGES)
    absent = [name for name in cli.COMMANDS if not re.search(rf"-m vidkernels {name}\b", text)]
    assert not absent


def resolves(dotted: str) -> bool:
    """Whether `ops.fsq_quantize`, `vidkernels.patch`, `training.tokenizer.LossConfig` and the like can be reached."""
    value: Any = importlib.import_module("vidkernels")
    for part in dotted.removeprefix("vidkernels.").split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            if not inspect.ismodule(value):
                return False
            try:
                value = importlib.import_module(f"{value.__name__}.{part}")
            except ModuleNotFoundError:
                return False
    return True


def test_dotted_names_resolve() -> None:
    pattern = re.compile(rf"`((?:{'|'.join(PREFIXES)})(?:\.\w+)+)[`(]")
    wrong = [f"{p.name}: {name}" for p in PAGES for name in set(pattern.findall(p.read_text())) if not resolves(name)]
    assert not wrong


def test_page_of_the_interface_is_made_from_the_docstrings() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == api_page.markdown(), "docs/api.md is old: run `python tests/api_page.py`"


@pytest.mark.parametrize("name", api_page.PACKAGES)
def test_public_names_say_what_they_do(name: str) -> None:
    bare = [
        item for item, value in api_page.public(name).items() if callable(value) and len(api_page.summary(value)) < 15
    ]
    assert not bare


def test_public_ops_say_what_they_take_and_refuse() -> None:
    for name, function in api_page.public("vidkernels.ops").items():
        text = inspect.getdoc(function) or ""
        assert "Args:" in text and "Raises:" in text, name
        assert re.search(r"\[[\w.][\w ,./*+-]*\]|shape", text), f"ops.{name}: no shape in its docstring"
        assert re.search(r"float|int32|int64|dtype", text), f"ops.{name}: no dtype in its docstring"
