"""Which ranks and nodes the others waited for: storage, decoding, a crowded CPU.

A step's lines name the rank that took longest from asking for its batches to starting the networks,
and by what factor of the median (`engine.metrics.machine_values`); and the rank whose device worked
longest between collectives (`working_values`). Its *delay* is what it took more than the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from m3i_scale.report.attempts import Attempt
from m3i_scale.report.read import COLUMN

MOST = 5  # that are named
PERIODS = 10


class Slow(NamedTuple):
    """A rank or node that was the slowest in some steps."""

    name: str
    steps: int
    delay: float  # seconds, all steps together


class Period(NamedTuple):
    """A part of the run, and who delayed it most."""

    begin: float  # time of day
    end: float
    worst: Slow
    host: str  # of the worst rank; empty where it is not known


class _Delays(NamedTuple):
    time: list[float]
    rank: list[int]
    host: list[str]
    delay: list[float]


def slowest(
    attempts: Sequence[Attempt], kind: str = "slowest"
) -> tuple[list[Slow], list[Slow], list[Period]]:
    """The worst ranks, the worst nodes, and the worst rank of each of some equal periods.

    Args:
        attempts: of the run.
        kind: "slowest", before the networks start; "device", between collectives.
    """
    found = _delays(attempts, kind)
    everything = range(len(found.time))
    ranks = _worst(found, everything, lambda n: f"rank {found.rank[n]}")
    nodes = _worst(found, everything, lambda n: found.host[n])
    periods = []
    if found.time:
        edges = np.linspace(min(found.time), max(found.time), PERIODS + 1).tolist()
        place = np.clip(np.searchsorted(edges, found.time, side="right") - 1, 0, PERIODS - 1)
        for number in range(PERIODS):
            inside = np.flatnonzero(place == number).tolist()
            worst = _worst(found, inside, lambda n: f"rank {found.rank[n]}")
            if worst:
                host = next(found.host[n] for n in inside if f"rank {found.rank[n]}" == worst[0][0])
                periods.append(Period(edges[number], edges[number + 1], worst[0], host))
    return ranks[:MOST], [node for node in nodes if node.name][:MOST], periods


def _delays(attempts: Sequence[Attempt], kind: str) -> _Delays:
    found = _Delays([], [], [], [])
    for attempt in attempts:
        ratio = attempt.rows[:, COLUMN[f"{kind}_ratio"]]
        known = np.isfinite(attempt.rows[:, COLUMN[f"{kind}_rank"]])
        for row in attempt.rows[(ratio > 1) & known]:  # alone there is nobody to wait
            rank = int(row[COLUMN[f"{kind}_rank"]])
            found.time.append(float(row[COLUMN["time"]]))
            found.rank.append(rank)
            found.host.append(attempt.hosts[rank] if 0 <= rank < len(attempt.hosts) else "")
            delay = row[COLUMN[f"{kind}_seconds"]] * (1 - 1 / row[COLUMN[f"{kind}_ratio"]])
            found.delay.append(float(np.nan_to_num(delay)))
    return found


def _worst(found: _Delays, chosen: Sequence[int], name: Callable[[int], str]) -> list[Slow]:
    sums: dict[str, tuple[int, float]] = {}
    for number in chosen:
        steps, delay = sums.get(name(number), (0, 0.0))
        sums[name(number)] = (steps + 1, delay + found.delay[number])
    slow = [Slow(who, steps, delay) for who, (steps, delay) in sums.items()]
    return sorted(slow, key=lambda one: -one.delay)
