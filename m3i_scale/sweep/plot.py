"""The plot of a sweep: a panel for each task, a point with error bars for each row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from m3i_scale.sweep.results import MethodRow, Results

COLOURS = ("#2563a8", "#c2570c", "#1a7f37", "#7a3e9d", "#8a6d00")
COLUMNS = 4


def save_plot(path: Path, results: Results) -> None:
    """Draw means with standard deviations, single seeds as small points, untrained as a line."""
    names = list(dict.fromkeys(row.name for row in results.rows))
    tasks = results.tasks
    columns = min(COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    height = 0.9 + 0.26 * len(names) * max(1, len(results.sections) / 1.5)
    picture = Picture(figsize=(1.6 + 2.6 * columns, height * lines), layout="constrained")
    FigureCanvasAgg(picture)
    axes = list(picture.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, results, names, task)
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    if len(results.sections) > 1:
        picture.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    picture.savefig(path, dpi=110)


def _panel(axis: Any, results: Results, names: list[str], task: str) -> None:
    sections = results.sections
    for number, (section, rows) in enumerate(sections.items()):
        colour = COLOURS[number % len(COLOURS)]
        shift = 0.5 * ((number + 0.5) / len(sections) - 0.5)
        for row in rows:
            if task in row.trained:
                place = names.index(row.name) + shift
                _point(axis, row, task, place, colour, section if row is rows[0] else None)
        untrained = [v for row in rows if task in row.untrained for v in row.untrained[task].values]
        if untrained:
            mean = 100 * sum(untrained) / len(untrained)
            axis.axvline(mean, color=colour, linewidth=0.8, linestyle=":")
    axis.set_title(task, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("%, dotted: untrained", fontsize=8)
    axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def _point(
    axis: Any, row: MethodRow, task: str, place: float, colour: str, label: str | None
) -> None:
    figure = row.trained[task]
    deviation = 0.0 if math.isnan(figure.deviation) else figure.deviation
    axis.errorbar(
        100 * figure.mean, place, xerr=100 * deviation, fmt="o", color=colour, markersize=5,
        capsize=3, linewidth=1.2, label=label,
    )  # fmt: skip
    values = [100 * value for value in figure.values]
    axis.plot(values, [place] * len(values), "|", color=colour, markersize=7, alpha=0.6)
