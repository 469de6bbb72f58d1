"""Which ranks and nodes the others waited for: storage, decoding, a crowded CPU.

A step's lines name the rank that took longest from asking for its batches to starting the networks,
and by what factor of the median (`engine.metrics.machine_values`); and the rank whose device worked
longest between collectives (`working_values`). Its *delay* is what it took more than the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3i_scale.report.attempts import Attempt
from m3i_scale.report.read import COLUMN, Rows
from m3i_scale.report.steps import WARM_UP

MOST = 5  # that are named
PERIODS = 10
# A spell: at least so many steps, hardly interrupted, in which the same rank cost more than a share
# of a usual step.
SPELL_STEPS, SPELL_GAP, SPELL_SHARE = 5, 2, 0.25
MOST_SPELLS = 50


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


class Spell(NamedTuple):
    """Steps in a row in which one rank held up all others."""

    attempt: int  # its number, from 1
    rank: int
    host: str  # empty where it is not known
    begin: float  # time of day
    end: float
    first_step: int
    last_step: int
    delay: float  # seconds, all steps together


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


def spells(attempts: Sequence[Attempt]) -> list[Spell]:
    """Where one rank held up all others for a while, the worst first."""
    found = []
    for number, attempt in enumerate(attempts, 1):
        rows = attempt.rows[WARM_UP:]
        taken = rows[:, COLUMN["step_seconds"]]
        if not np.isfinite(taken).any():
            continue
        limit = SPELL_SHARE * float(np.nanmedian(taken))
        rank, delay = _worst_of_each(rows)
        slow = np.flatnonzero(delay > limit)
        cut = (np.diff(slow) > SPELL_GAP + 1) | (np.diff(rank[slow]) != 0)
        for part in np.split(slow, np.flatnonzero(cut) + 1):
            if len(part) >= SPELL_STEPS:
                found.append(_spell(number, attempt, rows[part], int(rank[part[0]]), delay[part]))
    return sorted(found, key=lambda spell: -spell.delay)[:MOST_SPELLS]


def _worst_of_each(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each step the rank that held up the others most, before the networks or in them: (S,)."""
    ranks, delays = [], []
    for kind in ("slowest", "device"):
        ratio, rank = rows[:, COLUMN[f"{kind}_ratio"]], rows[:, COLUMN[f"{kind}_rank"]]
        known = (ratio > 1) & np.isfinite(rank)
        with np.errstate(invalid="ignore", divide="ignore"):
            delay = rows[:, COLUMN[f"{kind}_seconds"]] * (1 - 1 / ratio)
        delays.append(np.where(known, np.nan_to_num(delay), 0.0))
        ranks.append(np.where(known, rank, -1).astype(np.int64))
    kind_of, steps = np.argmax(delays, axis=0), np.arange(len(rows))
    return np.stack(ranks)[kind_of, steps], np.stack(delays)[kind_of, steps]


def _spell(
    number: int, attempt: Attempt, rows: Rows, rank: int, delay: NDArray[np.float64]
) -> Spell:
    host = attempt.hosts[rank] if 0 <= rank < len(attempt.hosts) else ""
    times, steps = rows[:, COLUMN["time"]], rows[:, COLUMN["step"]]
    begin = float(times[0] - np.nan_to_num(rows[0, COLUMN["step_seconds"]]))
    return Spell(
        number, rank, host, begin, float(times[-1]), int(steps[0]), int(steps[-1]),
        float(delay.sum()),
    )  # fmt: skip
