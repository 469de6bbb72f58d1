"""The results of a sweep's finished cells: mean, standard deviation and number of seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from m3i_scale.sweep import progress
from m3i_scale.sweep.grid import Cell
from m3i_scale.sweep.spec import Sweep

Flops = Callable[[Cell], float]  # of training, per sample


class Figure(NamedTuple):
    """A figure over seeds."""

    values: tuple[float, ...]  # by seed

    @property
    def mean(self) -> float:
        """Their mean; not a number without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; not a number below two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


class MethodRow(NamedTuple):
    """One combination of variants; shares of the queries, by task."""

    section: str  # the variants of all axes but the last
    name: str  # the variant of the last axis
    trained: dict[str, Figure]
    untrained: dict[str, Figure]
    chance: dict[str, float]
    spread: Figure  # least spread of a target group at the end of training: 0 is collapse
    gigaflops: float  # of training, per sample
    paper: dict[str, float]
    missing: tuple[str, ...]  # cells without a result

    @property
    def seeds(self) -> int:
        """How many runs the figures are means of."""
        return max((len(figure.values) for figure in self.trained.values()), default=0)


class Results(NamedTuple):
    """A sweep's table."""

    sweep: Sweep
    rows: list[MethodRow]
    tasks: list[str]

    @property
    def sections(self) -> dict[str, list[MethodRow]]:
        """Rows by section, in order."""
        names = dict.fromkeys(row.section for row in self.rows)
        return {name: [row for row in self.rows if row.section == name] for name in names}


def collect(sweep: Sweep, grid: Sequence[Cell], flops: Flops) -> Results:
    """Read the evaluations of all finished cells.

    Args:
        sweep: the grid's description.
        grid: all of its cells.
        flops: counts what one sample costs in training.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in grid:
        key = tuple(variant.name for variant in cell.variants.values())
        groups.setdefault(key, []).append(cell)
    rows = [_row(sweep, key, group, flops) for key, group in groups.items()]
    every = dict.fromkeys(task for row in rows for task in row.trained)
    return Results(sweep, rows, sweep.report.tasks or list(every))


def _row(sweep: Sweep, key: tuple[str, ...], group: Sequence[Cell], flops: Flops) -> MethodRow:
    finished = [cell for cell in group if progress.is_finished(cell, sweep.evaluation)]
    lines = [line for cell in finished for line in read_evaluation(cell)]
    tasks = dict.fromkeys(line["task"] for line in lines)

    def figures(who: str) -> dict[str, Figure]:
        return {
            task: Figure(tuple(float(line[who]) for line in lines if line["task"] == task))
            for task in tasks
        }

    spreads = [spread for cell in finished if (spread := least_spread(cell)) is not None]
    return MethodRow(
        section=" ".join(key[:-1]),
        name=key[-1],
        trained=figures("trained"),
        untrained=figures("untrained"),
        chance={task: figure.mean for task, figure in figures("chance").items()},
        spread=Figure(tuple(spreads)),
        gigaflops=flops(group[0]) / 1e9,
        paper={k: v for variant in group[0].variants.values() for k, v in variant.paper.items()},
        missing=tuple(cell.name for cell in group if cell not in finished),
    )


def read_evaluation(cell: Cell) -> list[dict[str, Any]]:
    """The rows of a cell's eval.json."""
    return json.loads((cell.folder / "eval.json").read_text())["rows"]


def least_spread(cell: Cell, share: float = 0.1) -> float | None:
    """Spread of the target group that has least, mean of the last `share` of the steps.

    None where no target has a spread (texts and categories have none).
    """
    lines = []
    for text in (cell.folder / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # a crash can cut a line short
    last = lines[-max(1, round(share * len(lines))) :]
    names = {name for line in last for name in line if name.startswith("spread/")}
    means = [statistics.fmean(line[name] for line in last if name in line) for name in names]
    return min(means, default=None)
