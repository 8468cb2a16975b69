# SPDX-License-Identifier: Apache-2.0
"""JSON -> PNG. One picture a stem: one line a case, one mark a contestant, the machine's limit as a tick."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from vidkernels import _files

STYLES = {"vidkernels": ("#0072b2", "o"), "eager": ("#888888", "s"), "torch.compile": ("#e69f00", "D")}
OTHERS = (("#009e73", "^"), ("#cc79a7", "v"), ("#d55e00", "P"), ("#56b4e9", "X"), ("#000000", "*"))
MAX_CASES = 40


def _style(name: str, names: list[str]) -> tuple[str, str]:
    others = [n for n in names if n not in STYLES]
    return STYLES[name] if name in STYLES else OTHERS[others.index(name) % len(OTHERS)]


def plot_stem(document: Mapping[str, Any], path: Path) -> bool:
    """Draw one stem. False if it has no row with a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in document["results"] if any("ms" in row for row in r["rows"].values())][:MAX_CASES]
    if not results:
        return False
    names = list(dict.fromkeys(name for r in results for name in r["rows"]))
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.34 * len(results)), layout="constrained")
    for name in names:
        colour, marker = _style(name, names)
        rows = [(i, r["rows"][name]) for i, r in enumerate(results) if "ms" in r["rows"].get(name, {})]
        if not rows:
            continue
        times = [report.shown_ms(row) for _, row in rows]
        # percentiles are those of the events, and say nothing of a graph
        spread = [
            [0.0 if row.get("graph_ms") else abs(row[key] - row["ms"]) for _, row in rows]
            for key in ("p20_ms", "p80_ms")
        ]
        front = 3 if name == report.OURS else 2
        axes.errorbar(
            times, [i for i, _ in rows], xerr=spread, fmt=marker, color=colour, label=name, markersize=6, zorder=front
        )
    for i, result in enumerate(results):
        if result.get("floor_ms"):
            label = "limit of the machine" if i == 0 else None
            axes.plot(result["floor_ms"], i, "|", color="black", markersize=14, label=label)
        ratio = report.speedup(result)
        text = "" if ratio is None else f"{ratio:.2f}x"
        axes.annotate(text, (1.005, i), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.set_yticks(range(len(results)), [r["case"] for r in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        "milliseconds, log scale; median with 20th and 80th percentile (of a short call on a GPU: by CUDA graph). "
        "At the right: ours against the best other"
    )
    axes.set_title(f"{document['stem']}\n{machine.line(document['machine'])}", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(6, len(names) + 1))
    with _files.whole(path) as partial:
        figure.savefig(partial, dpi=130)
    pyplot.close(figure)
    return True
