# SPDX-License-Identifier: Apache-2.0
"""What the demo writes: report.json, report.md, time_and_memory.png, frames.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vidkernels import _files
from vidkernels._commands.demo_run import Check, Comparison

BEFORE, AFTER = "#999999", "#0072b2"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Header and one row a comparison, as text."""
    found = [["clip", "", "encode", "decode", "both", "peak memory"]]
    for comparison in comparisons:
        shape = "x".join(map(str, comparison.shape[2:]))
        pair = [(v.to_dict(), v) for v in (comparison.unpatched, comparison.patched)]
        for label, (measured, variant) in zip(("unpatched", "patched"), pair, strict=True):
            times = [_seconds(measured[name]) for name in ("encode_s", "decode_s", "total_s")]
            found.append([f"{comparison.dtype} {shape}", label, *times, _gib(variant.peak_bytes)])
        ratios = [f"{pair[0][0][name] / pair[1][0][name]:.2f}x" for name in ("encode_s", "decode_s", "total_s")]
        before, after = (v.peak_bytes or 0 for _, v in pair)
        memory = f"{before / after:.2f}x less" if before and after else "-"
        found.append(["", "faster", *ratios, memory])
    return found


def check_lines(checks: dict[str, list[Check]]) -> list[str]:
    """One line an output: its errors and whether the promise holds."""
    return [
        f"{name} {check.output}: error against float64 {check.error_patched:.3g} patched, {check.error_unpatched:.3g} "
        f"unpatched, allowed {check.allowed:.3g}: {'kept' if check.kept else 'BROKEN'}"
        for name, found in checks.items()
        for check in found
    ]


def pixel_line(comparison: Comparison) -> str:
    """How far the two reconstructions are apart in 8 bits, as a viewer would see them."""
    before, after = (_to_bytes(o.decoded).int() for o in (comparison.before, comparison.after))
    apart = (before - after).abs()
    same = 100 * (apart == 0).double().mean().item()
    return f"{same:.4f} % of the 8-bit pixel values are identical, the largest difference is {int(apart.max())}"


def _to_bytes(video: torch.Tensor) -> torch.Tensor:
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def document(
    comparisons: Sequence[Comparison], checks: dict[str, list[Check]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything measured, for report.json."""
    return {
        **facts,
        "comparisons": [
            {
                "dtype": c.dtype,
                "shape": c.shape,
                "unpatched": c.unpatched.to_dict(),
                "patched": c.patched.to_dict(),
                "speedup": c.speedup,
            }
            for c in comparisons
        ],
        "promise": {
            name: [
                {
                    "output": c.output,
                    "error_unpatched": c.error_unpatched,
                    "error_patched": c.error_patched,
                    "allowed": c.allowed,
                    "kept": c.kept,
                }
                for c in found
            ]
            for name, found in checks.items()
        },
    }


def markdown_table(table: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def write_markdown(
    path: Path, comparisons: Sequence[Comparison], checks: dict[str, list[Check]], machine: str, notes: Sequence[str]
) -> None:
    """report.md."""
    parts = [
        "# A real clip through AutoencoderVidTok, unpatched and patched",
        machine,
        markdown_table(rows(comparisons)),
        "Median times. Memory is what one pass needs beyond the weights and all else that was there before it; on a CPU it "
        "is the growth of the resident set, each variant in a process of its own.",
        "## Equality",
        "\n".join(f"* {line}" for line in [*check_lines(checks), pixel_line(comparisons[0])]),
        "![frames](frames.png)",
        "![time and memory](time_and_memory.png)",
        "## What was patched",
        f"```\n{comparisons[0].patch_report}\n```",
    ]
    if notes:
        parts += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    if (path.parent / "benchmarks.md").exists():
        parts.append("Microbenchmarks of every op: [benchmarks.md](benchmarks.md).")
    _files.write_text(path, "\n\n".join(parts) + "\n")


def plot_bars(path: Path, comparisons: Sequence[Comparison], machine: str) -> None:
    """Times and peak memory, unpatched beside patched, one row of axes a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(comparisons),
        2,
        figsize=(9, 2.6 * len(comparisons)),
        layout="constrained",
        squeeze=False,
        width_ratios=[3, 1],
    )
    for (times, memory), comparison in zip(grid, comparisons, strict=True):
        variants = (("unpatched", comparison.unpatched, BEFORE), ("patched", comparison.patched, AFTER))
        for index, (label, variant, colour) in enumerate(variants):
            measured = variant.to_dict()
            values = [measured[name] for name in ("encode_s", "decode_s", "total_s")]
            bars = times.bar([i + 0.38 * index for i in range(3)], values, 0.36, label=label, color=colour)
            times.bar_label(bars, [_seconds(v) for v in values], fontsize=7, padding=2)
            if variant.peak_bytes is not None:
                bar = memory.bar([index], [variant.peak_bytes / 2**30], 0.7, color=colour)
                memory.bar_label(bar, [_gib(variant.peak_bytes)], fontsize=7, padding=2)
        times.set_xticks([i + 0.19 for i in range(3)], ["encode", "decode", "both"])
        times.set_ylabel("seconds")
        times.set_title(
            f"{comparison.dtype} {'x'.join(map(str, comparison.shape[2:]))}: {comparison.speedup:.2f}x", fontsize=9
        )
        times.legend(fontsize=8)
        memory.set_xticks([0, 1], ["unpatched", "patched"], fontsize=8)
        memory.set_ylabel("peak GiB")
        for axes in (times, memory):
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine, fontsize=7)
    with _files.whole(path) as partial:
        figure.savefig(partial, dpi=140)
    pyplot.close(figure)


def plot_frames(path: Path, clip: torch.Tensor, comparison: Comparison, trained: bool) -> None:
    """The clip, both reconstructions and their difference, six frames of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    before, after = comparison.before.decoded.float().cpu(), comparison.after.decoded.float().cpu()
    picked = torch.linspace(0, min(clip.shape[2], before.shape[2]) - 1, 6).round().long().tolist()
    apart = (before - after).abs()
    scale = max(apart.max().item(), 1e-12)
    videos = [clip.float().cpu(), *(_stretched(v, before, trained) for v in (before, after)), apart / scale * 2 - 1]
    random = "" if trained else "\n(random weights,\ncontrast stretched)"
    labels = ["clip", f"unpatched{random}", f"patched{random}", f"difference\nwhite = {scale:.1e}"]
    figure, grid = pyplot.subplots(len(videos), len(picked), figsize=(10.5, 6.8), layout="constrained")
    for axes_row, video, label in zip(grid, videos, labels, strict=True):
        for axes, index in zip(axes_row, picked, strict=True):
            axes.imshow(_to_bytes(video[0, :, index]).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if video is videos[0]:
                axes.set_title(f"frame {index}", fontsize=8)
        axes_row[0].set_ylabel(label, fontsize=9)
    with _files.whole(path) as partial:
        figure.savefig(partial, dpi=140)
    pyplot.close(figure)


def _stretched(video: torch.Tensor, by: torch.Tensor, trained: bool) -> torch.Tensor:
    """With random weights the output is nearly flat: show it over its own range, the same for both."""
    if trained:
        return video
    low, high = torch.quantile(by.flatten()[:: max(1, by.numel() // 100000)], torch.tensor([0.01, 0.99])).tolist()
    return (video - low) / max(high - low, 1e-12) * 2 - 1


def write_json(path: Path, found: dict[str, Any]) -> None:
    """report.json."""
    _files.write_text(path, json.dumps(found, indent=1) + "\n")
