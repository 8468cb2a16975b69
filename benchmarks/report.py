# SPDX-License-Identifier: Apache-2.0
"""JSON -> Markdown tables. Numbers in the README come from here, never from a keyboard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from vidkernels import _files
from vidkernels.errors import OptionError

Result = Mapping[str, Any]
OURS = "vidkernels"
OWN = "ours, "  # begins the names of our backends that were not chosen: shown, but no rivals
README_BEGIN, README_END = "<!-- results: begin -->", "<!-- results: end -->"
PAGE_ROWS = 4
GRAPH = "ᴳ"


def milliseconds(value: float) -> str:
    """A time with three significant digits and its unit."""
    if value < 1:
        return f"{value * 1e3:.3g} us"
    return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def mebibytes(value: float) -> str:
    """A size with three significant digits and its unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def cell(row: Mapping[str, Any] | None) -> str:
    """A contestant's time, or the word that stands for it."""
    if row is None:
        return "-"
    if "ms" not in row:
        return "**WRONG**" if row["status"] == "WRONG" else "failed"
    replayed = row.get("graph_ms") or row.get("whole_graph_ms")
    graph = f" ({GRAPH} {milliseconds(replayed)})" if replayed else ""
    marks = (" ~" if row.get("noisy") else "") + (" ≉" if row["status"] == "loose" else "")
    return milliseconds(row["ms"]) + graph + marks


def shown_ms(row: Mapping[str, Any]) -> float:
    """The time that rates and pictures show: without the host's queueing where a CUDA graph could tell."""
    return row.get("graph_ms") or row["ms"]


def speedup(result: Result, rival: str | None = None) -> float | None:
    """Time of ``rival`` (the best one if None) over ours, of both by CUDA graph if both have one; above 1 we win."""
    found = _compared(result, rival)
    return found[0] if found else None


def _compared(result: Result, rival: str | None = None) -> tuple[float, bool] | None:
    """(Ratio, whether by CUDA graph); the smallest over all rivals if none is named."""
    rows = result["rows"]
    ours = rows.get(OURS)
    if ours is None or "ms" not in ours:
        return None
    found = []
    rivals = [row for name, row in rows.items() if name != OURS and not name.startswith(OWN)]
    for row in rivals if rival is None else [rows.get(rival)]:
        if row and "ms" in row:
            key = "graph_ms" if row.get("graph_ms") and ours.get("graph_ms") else "ms"
            found.append((row[key] / ours[key], key == "graph_ms"))
    return min(found, default=None)


def geometric_mean(values: Iterable[float]) -> float | None:
    """The right mean for ratios."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _contestants(results: Iterable[Result]) -> list[str]:
    order: dict[str, None] = {}
    for result in results:
        order.update(dict.fromkeys(result["rows"]))
    return list(order)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _table_row(result: Result, names: list[str]) -> list[str]:
    mark = " †" if result.get("fresh_pages") else ""
    mark += f" ({result['measured']['commit']})" if "measured" in result else ""
    if "error" in result:
        return [result["case"] + mark, *["failed"] * len(names), "-", "-", "-", "-"]
    ours = result["rows"].get(OURS, {})
    eager = result["rows"].get("eager", {})
    # the JSON's rates are by events
    faster = ours["ms"] / shown_ms(ours) if "ms" in ours else 1.0
    percent = ours.get("percent_of_limit")
    limit = "-" if percent is None else f"{percent * faster:.0f} % of {result['bound']}"
    rate = f"{ours['tflops'] * faster:.3g} TFLOP/s" if result["bound"] == "matmul" and "tflops" in ours else "-"
    if result["bound"] == "copy" and "gbps" in ours:
        rate = f"{ours['gbps'] * faster:.3g} GB/s"
    sizes = " / ".join(mebibytes(r["peak_bytes"]) if "peak_bytes" in r else "-" for r in (ours, eager))
    cells = [cell(result["rows"].get(name)) for name in names]
    compared = _compared(result)
    ratio = _ratio(speedup(result)) + (f" {GRAPH}" if compared and compared[1] else "")
    return [result["case"] + mark, *cells, ratio, rate, limit, sizes]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, columns padded so that it reads in a terminal too."""
    escaped = [[c.replace("|", "\\|") for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in escaped) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in escaped]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def stem_markdown(document: Mapping[str, Any]) -> str:
    """The tables of one stem's JSON."""
    results = document["results"]
    names = _contestants(results)
    header = ["case", *names, "vs best other", "rate", "of limit", "peak ours / eager"]
    lines = [f"## {document['stem']}", "", table(header, (_table_row(r, names) for r in results)), ""]
    faults = [
        f"* `{result['case']}`, {name}: {row['status']}, {row['detail']}"
        for result in results
        for name, row in result["rows"].items()
        if row["status"] != "ok"
    ]
    faults += [f"* `{r['case']}`: failed, {r['error']}" for r in results if "error" in r]
    notes = sorted({f"* {r['note']}" for r in results if r.get("note")})
    lines += [*notes, *faults, ""] if notes or faults else []
    return "\n".join(lines)


def _ceilings(documents: Sequence[Mapping[str, Any]]) -> str:
    limits: dict[str, Any] = {}
    for document in documents:
        limits = document.get("limits", {}) | limits
    ceilings = [f"copy {limits['copy_gbps']:.4g} GB/s"] if "copy_gbps" in limits else []
    ceilings += [f"matmul {dtype} {rate:.3g} TFLOP/s" for dtype, rate in limits.get("matmul_tflops", {}).items()]
    return f" Ceilings measured by the same harness: {', '.join(ceilings)}." if ceilings else ""


def legend(*groups: Sequence[Mapping[str, Any]]) -> str:
    """Machines, ceilings and how to read the tables."""
    documents = [document for group in groups for document in group]
    text = [
        *(f"Measured on {machine.line(group[0]['machine'])}.{_ceilings(group)}" for group in groups),
        "Median times; `~` marks a spread of more than 20 % between the 20th and 80th percentiles. Every contestant is"
        " verified before it is timed: WRONG marks one whose error against float64 breaks the promise, `≉` a rival slightly"
        " outside it, which is timed all the same. Peak memory is what one call allocates.",
    ]
    rows = [row for d in documents for r in d["results"] for row in r["rows"].values()]
    if any(row.get("graph_ms") or row.get("whole_graph_ms") for row in rows):
        text.append(
            "GPU times are taken with events around one call and include the wait for the host to queue it;"
            f" {GRAPH} is the same call replayed from a CUDA graph, as in a captured loop or behind a full queue. A ratio marked"
            f" {GRAPH} compares two such replays; all other ratios, and those of whole models, compare event times. Our rate and"
            " share of the limit are those of the replay where there is one."
        )
    if any("measured" in r for d in documents for r in d["results"]):
        text.append("A case with a commit after its name was last measured at that commit.")
    if any(r.get("fresh_pages") for d in documents for r in d["results"]):
        text.append("† outputs above 32 MiB: every contestant pays for freshly mapped pages, and that cost dominates.")
    return "\n".join(t for t in text if t)


def _figures(document: Mapping[str, Any]) -> list[str]:
    """Geometric means of the ratios against eager, torch.compile and the best, and how many rows are won."""
    results = document["results"]
    best = [s for s in map(speedup, results) if s is not None]
    means = [
        geometric_mean(s for r in results if (s := speedup(r, rival)) is not None)
        for rival in ("eager", "torch.compile")
    ]
    wrong = sum(r["rows"].get(OURS, {}).get("status") != "ok" for r in results)
    contested = sum(len(r["rows"]) != 1 for r in results)  # a case that failed has none, and counts
    won = f"{sum(s >= 1 for s in best)} of {contested}" + (f", {wrong} without a time" if wrong else "")
    return [*map(_ratio, [*means, geometric_mean(best)]), won]


def summary(documents: Sequence[Mapping[str, Any]]) -> str:
    """One line a stem."""
    header = ["stem", "vs eager", "vs torch.compile", "vs best other", "rows won against the best"]
    return table(header, ([document["stem"], *_figures(document)] for document in documents))


def summaries(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """One line a stem, with columns for each of several machines, but those in which nothing was measured."""
    if len(groups) == 1:
        return summary(groups[0])
    by_stem = [{document["stem"]: document for document in group} for group in groups]
    stems = list(dict.fromkeys(stem for known in by_stem for stem in known))
    columns = [["stem", *stems]]
    for group, known in zip(groups, by_stem, strict=True):
        device = machine.short(group[0]["machine"])
        cells = [_figures(known[stem]) if stem in known else ["-"] * 4 for stem in stems]
        for title, column in zip(("vs eager", "vs compile", "vs best", "won"), zip(*cells, strict=True), strict=True):
            if set(column) != {"-"}:
                columns.append([f"{device}: {title}" if title == "vs eager" else title, *column])
    header, *rows = map(list, zip(*columns, strict=True))
    return table(header, rows)


def read(folder: Path) -> list[dict[str, Any]]:
    """The documents of a results folder, sorted by stem; files of other kinds are passed over."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            documents.append(json.loads(path.read_text()))
        except ValueError as error:
            raise OptionError(
                str(path), "a JSON file", f"one where {error}", "Remove it and run its stem again."
            ) from error
    return [d for d in documents if "results" in d]


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """The whole report."""
    parts = ["# Benchmarks", legend(documents), summary(documents), *map(stem_markdown, documents)]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def update_readme(readme: Path, groups: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Replace what stands between the two result marks of the README: one table of all machines."""
    _replace(readme, f"{summaries(groups)}\n\n{legend(*groups)}")


def _replace(page: Path, body: str) -> None:
    text = page.read_text()
    if README_BEGIN not in text or README_END not in text:
        raise ValueError(f"{page.name} lacks the lines {README_BEGIN} and {README_END}")
    before, rest = text.split(README_BEGIN, 1)
    after = rest.split(README_END, 1)[1]
    _files.write_text(page, f"{before}{README_BEGIN}\n{body}\n{README_END}{after}")


def _sample(results: Sequence[Result], count: int) -> list[Result]:
    """Cases spread over the list, the one with the least gain among them."""
    timed = [r for r in results if speedup(r) is not None]
    worst = min(timed, key=lambda r: speedup(r) or 0.0, default=None)
    spread = [results[i * len(results) // count] for i in range(count)] if len(results) > count else list(results)
    if worst is not None and worst not in spread:
        spread[-1] = worst
    return [r for r in results if r in spread]


def _page_part(documents: Mapping[str, Any], folder: Path, docs: Path) -> str:
    results = documents["results"]
    names = _contestants(results)
    rows = [_table_row(r, names) for r in _sample(results, PAGE_ROWS)]
    shown = table(["case", *names, "vs best other", "rate", "of limit", "peak ours / eager"], rows)
    link = Path(os.path.relpath(folder / "benchmarks.md", docs)).as_posix()
    count = f"{len(rows)} of {len(results)} rows, the worst one included" if len(rows) < len(results) else "All rows"
    where = f"What the marks mean, and the other tables: [benchmarks.md]({link}#{documents['stem']})"
    return f"{shown}\n\n{count}. {machine.line(documents['machine'])}. {where}."


def update_docs(docs: Path, groups: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Replace what stands between the marks of `docs/<stem>.md`: for each folder of results a few rows, the worst among
    them, and where the rest is. A page of the stem's name without marks is about something else (models) and stays."""
    parts: dict[str, list[str]] = {}
    for folder, documents in groups.items():
        for document in documents:
            parts.setdefault(document["stem"], []).append(_page_part(document, folder, docs))
    for stem, found in parts.items():
        page = docs / f"{stem}.md"
        if page.exists() and README_BEGIN in page.read_text():
            _replace(page, "\n\n".join(found))
