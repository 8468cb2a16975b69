# SPDX-License-Identifier: Apache-2.0
"""JSON -> PNG. One picture a stem: every contestant's time as a bar, the floor as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, report

COLOURS = {"vidkernels": "#0072b2", "eager": "#999999", "torch.compile": "#e69f00"}
OTHERS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
MAX_CASES = 16


def _colour(name: str, names: list[str]) -> str:
    return COLOURS.get(name) or OTHERS[[n for n in names if n not in COLOURS].index(name) % len(OTHERS)]


def plot_stem(document: Mapping[str, Any], path: Path) -> bool:
    """Draw one stem. False if it has no row with a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in document["results"] if any("ms" in row for row in r["rows"].values())][:MAX_CASES]
    if not results:
        return False
    names = list(dict.fromkeys(name for r in results for name in r["rows"]))
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.24 * len(names) * len(results)), layout="constrained")
    for index, name in enumerate(names):
        rows = [(i, r["rows"][name]) for i, r in enumerate(results) if "ms" in r["rows"].get(name, {})]
        y = [i + (index - (len(names) - 1) / 2) * height for i, _ in rows]
        bars = axes.barh(y, [row["ms"] for _, row in rows], height, label=name, color=_colour(name, names))
        axes.bar_label(bars, [report.milliseconds(row["ms"]) for _, row in rows], padding=3, fontsize=7)
    for i, result in enumerate(results):
        if result.get("floor_ms"):
            label = "limit of the machine" if i == 0 else None
            axes.plot([result["floor_ms"]] * 2, [i - 0.45, i + 0.45], color="black", linewidth=1.2, label=label)
    axes.set_yticks(range(len(results)), [r["case"] for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds (log scale, lower is better)")
    axes.set_title(f"{document['stem']}\n{machine.line(document['machine'])}", fontsize=9)
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
