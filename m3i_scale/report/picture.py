"""The picture of a report: loss over attempts, where the time went, whom the others waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m3i_scale.report.page import SHARE_NAMES
from m3i_scale.report.read import COLUMN
from m3i_scale.report.shares import Account

COLOURS = {
    "training": "#2563a8",
    "data": "#7fb3e6",
    "checkpoint": "#1a7f37",
    "evaluation": "#59b8a9",
    "start_up": "#e0a100",
    "lost": "#c2570c",
    "stalls": "#b01030",
    "queueing": "#999999",
    "down": "#d0d0d0",
    "other": "#7a3e9d",
}
_NOT_DRAWN = {"images", "left_out"}  # of evaluations
MOST_POINTS = 4000  # of a curve


def save_picture(
    path: Path,
    accounts: Sequence[Account],
    shares: dict[str, float],
    evaluations: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Draw three panels over each other as a PNG, and a fourth where there are evaluations."""
    learned = {name: points for name, points in evaluations.items() if name not in _NOT_DRAWN}
    heights = (3, 2, 2, 3) if learned else (3, 2, 2)
    figure = Figure(figsize=(10, 1.3 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    _loss(axes[0], accounts)
    _time(axes[1], accounts, shares)
    _slow(axes[2], accounts)
    if learned:
        _learned(axes[3], learned)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110, format="png")


def _thin(rows: Any) -> Any:
    return rows[:: max(1, len(rows) // MOST_POINTS)]


def _loss(axis: Any, accounts: Sequence[Account]) -> None:
    """The loss by step, attempts in colours: steps made again lie over each other."""
    for number, account in enumerate(accounts):
        rows = _thin(account.attempt.rows)
        if len(rows):
            colour = ("#2563a8", "#c2570c", "#1a7f37", "#7a3e9d")[number % 4]
            style = {"marker": ".", "markersize": 3} if len(rows) < 100 else {}
            axis.plot(rows[:, COLUMN["step"]], rows[:, COLUMN["loss"]], color=colour, lw=1, **style)
            if number:
                axis.axvline(rows[0, COLUMN["step"]], color=colour, lw=0.6, ls=":")
    axis.set_title("loss by step; each attempt begins at a dotted line", fontsize=9)
    axis.set_xlabel("step", fontsize=8)


def _time(axis: Any, accounts: Sequence[Account], shares: dict[str, float]) -> None:
    """Share of each attempt's time, the run's at the top."""
    bars = [("all", shares), *((str(n), a.shares) for n, a in enumerate(accounts, 1))][:31]
    for place, (_, seconds) in enumerate(bars):
        whole, left = sum(seconds.values()) or 1.0, 0.0
        for name, value in seconds.items():
            label = SHARE_NAMES[name] if place == 0 else None
            axis.barh(place, 100 * value / whole, left=left, color=COLOURS[name], label=label)
            left += 100 * value / whole
    axis.set_yticks(range(len(bars)), [name for name, _ in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title("time of the run and of its attempts, %", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _slow(axis: Any, accounts: Sequence[Account]) -> None:
    """How many times the median the slowest rank took, coloured by rank."""
    every = _thin(np.concatenate([account.attempt.rows for account in accounts]))
    known = every[every[:, COLUMN["slowest_ratio"]] > 1]
    if len(known):
        names = ("step", "slowest_ratio", "slowest_rank")
        step, ratio, rank = (known[:, COLUMN[name]] for name in names)
        points = axis.scatter(step, ratio, c=rank, s=6, cmap="viridis")
        axis.figure.colorbar(points, ax=axis, label="rank")
    axis.set_title("slowest rank before the networks start, times the median", fontsize=9)
    axis.set_xlabel("step", fontsize=8)


def _learned(axis: Any, evaluations: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Figures of evaluations by step."""
    for name, points in evaluations.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, "o-", ms=3, lw=1, label=name.replace("_", " "))
    axis.set_title("evaluation by step", fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
