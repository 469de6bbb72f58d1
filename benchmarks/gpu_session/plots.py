"""The plots of a session's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_names
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]


def planned(run: Row, plan: Row, path: Path) -> bool:
    """Bars of planned and measured time and memory."""
    pairs = [
        ("step, s", plan["step_ms"] / 1e3, run["step_ms_p50"] / 1e3),
        ("device busy, s", plan["computing_ms"] / 1e3, (run.get("kernel_ms") or 0) / 1e3),
        ("tensors, GiB", plan["tensors_gib"], run["peak_memory_gib"]),
    ]
    figure, panels = plt.subplots(1, len(pairs), figsize=(8, 3))
    for panel, (title, before, after) in zip(panels, pairs, strict=True):
        bars = panel.bar(["planned", "measured"], [before, after], color=["#9db7d5", "#2f5d8a"])
        panel.bar_label(bars, fmt="%.3g")
        panel.set_title(title)
        panel.margins(y=0.15)
    return _save(figure, path)


def kernels(longest: list[Row], run: Row, path: Path) -> bool:
    """The longest kernels, and what all others take together."""
    names = [kernel_names.short(row["kernel"])[:60] for row in longest]
    taken = [row["milliseconds"] for row in longest]
    rest = (run.get("kernel_ms") or 0) - sum(taken)
    if rest > 0:
        names, taken = [*names, "all others"], [*taken, rest]
    figure, panel = plt.subplots(figsize=(9, 0.35 * len(names) + 1))
    bars = panel.barh(range(len(names)), taken[::-1], color="#2f5d8a")  # names may repeat
    panel.set_yticks(range(len(names)), names[::-1])
    panel.margins(x=0.1)
    panel.bar_label(bars, fmt="%.2f", fontsize=7)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_xlabel("ms in a step")
    return _save(figure, path)


def shares(rows: list[Row], path: Path) -> bool:
    """Share of the copy's bandwidth by problem, one panel per direction; False without rows."""
    rows = [row for row in rows if row.get("fraction_of_copy")]
    if not rows:
        return False
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    problems = list(dict.fromkeys(row["name"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, panels = plt.subplots(
        1, len(directions), figsize=(4 * len(directions), 3.4), squeeze=False, sharey=True
    )
    for panel, direction in zip(panels[0], directions, strict=True):
        for place, name in enumerate(names):
            mine = [r for r in rows if (r["direction"], r["implementation"]) == (direction, name)]
            at = [problems.index(r["name"]) + 0.8 * (place / len(names) - 0.5) for r in mine]
            heights = [r["fraction_of_copy"] for r in mine]
            panel.bar(at, heights, 0.8 / len(names), label=name, align="edge")
        panel.set_xticks(range(len(problems)), problems, rotation=30, ha="right", fontsize=7)
        panel.set_title(direction)
    panels[0][0].set_ylabel("share of a copy's bandwidth")
    panels[0][-1].legend(fontsize=7)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> bool:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
