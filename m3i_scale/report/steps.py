"""The time of each step of an attempt, divided: what the start-up, waits and stalls took of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3i_scale.report.attempts import Attempt
from m3i_scale.report.read import COLUMN

WARM_UP = 3  # steps of an attempt whose excess over a usual one belongs to the start-up
ENOUGH = 3  # steps beyond these, of which a median says what is usual
# A step has stalled if it took more than so many times a usual one, and so many seconds more.
STALL_FACTOR, STALL_SECONDS = 5.0, 10.0

Column = NDArray[np.float64]


class Usual(NamedTuple):
    """Seconds of a usual step: the median."""

    step: float  # without evaluations and waits for checkpoints
    work: float  # without waits for data, either


@dataclass
class Steps:
    """Columns with an entry for each step of an attempt, seconds where nothing else is said."""

    step: NDArray[np.int64]  # number
    segment: NDArray[np.int64]  # after how many rollbacks
    first: Column  # excess of the first steps
    training: Column
    data: Column
    checkpoint: Column
    evaluation: Column
    stalls: Column
    other: Column
    restoring: list[float]  # before the beginning of each segment but the first
    end: float  # when the last step ended, or the last segment began

    @property
    def all_but_first(self) -> Column:
        """Everything but the excess of the first steps."""
        waits = self.data + self.checkpoint + self.evaluation
        return self.training + waits + self.stalls + self.other


class _Raw(NamedTuple):
    """What an attempt's lines say of its steps."""

    step: NDArray[np.int64]
    segment: NDArray[np.int64]
    taken: Column  # seconds since the step before
    steps: Column  # how many these are: lines between may be damaged
    data: Column
    checkpoint: Column
    evaluation: Column
    own: Column  # `step_seconds`
    ends: Column  # time of day

    @property
    def left(self) -> Column:
        """Seconds without evaluations and waits for checkpoints."""
        return self.taken - self.checkpoint - self.evaluation


def usual_steps(attempts: Sequence[Attempt]) -> list[Usual]:
    """Of each attempt; of those on as many ranks, or of all, where an attempt has too few steps."""
    samples = [_samples(attempt) for attempt in attempts]
    found = []
    for attempt, own in zip(attempts, samples, strict=True):
        alike = [s for a, s in zip(attempts, samples, strict=True) if a.ranks == attempt.ranks]
        choices = (own, np.concatenate(alike), np.concatenate(samples))
        enough = next((choice for choice in choices if len(choice) >= ENOUGH), None)
        found.append(_least(attempts) if enough is None else Usual(*np.median(enough, axis=0)))
    return found


def _samples(attempt: Attempt) -> NDArray[np.float64]:
    """Seconds of the steps beyond the first ones: (steps, 2), as `Usual`."""
    raw = _raw(attempt)
    step = raw.left
    good = (raw.steps == 1) & (np.arange(len(step)) >= WARM_UP)
    return np.stack([step, np.clip(step - raw.data, 0, None)], axis=1)[good]


def _least(attempts: Sequence[Attempt]) -> Usual:
    """The fastest of few steps."""
    every = [_raw(attempt) for attempt in attempts if len(attempt.rows)]
    if not every:
        return Usual(0.0, 0.0)
    step = np.concatenate([raw.left / raw.steps for raw in every])
    data = np.concatenate([raw.data / raw.steps for raw in every])
    best = int(step.argmin())
    return Usual(float(step[best]), max(0.0, float(step[best] - data[best])))


def _raw(attempt: Attempt) -> _Raw:
    rows, begins = attempt.rows, attempt.begins
    step = rows[:, COLUMN["step"]].astype(np.int64)
    if not begins:
        empty = np.empty(0)
        return _Raw(step, step, empty, empty, empty, empty, empty, empty, empty)
    starts = np.array([time for _, time in begins])
    ends = np.maximum(rows[:, COLUMN["time"]], starts[0])
    segment = np.searchsorted(starts, ends, side="right") - 1
    before = np.concatenate([[False], segment[1:] == segment[:-1]])[: len(step)]  # in its segment
    since = np.where(before, np.roll(ends, 1), starts[segment])
    firsts = np.array([first for first, _ in begins])
    number = np.where(before, step - np.roll(step, 1), step - firsts[segment] + 1)
    taken = ends - since
    wait = np.clip(np.nan_to_num(rows[:, COLUMN["checkpoint_wait"]]), 0, taken)
    tested = np.clip(np.nan_to_num(rows[:, COLUMN["evaluation"]]), 0, taken - wait)
    data = np.clip(np.nan_to_num(rows[:, COLUMN["data_wait"]]), 0, taken - wait - tested)
    own = rows[:, COLUMN["step_seconds"]]
    return _Raw(step, segment, taken, np.maximum(number, 1.0), data, wait, tested, own, ends)


def split_steps(attempt: Attempt, usual: Usual) -> Steps:
    """Divide each step's time; the columns of a step sum up to the time since the one before."""
    raw = _raw(attempt)
    left = raw.left
    early = np.arange(len(left)) < WARM_UP
    first = np.where(early, np.clip(left - raw.steps * usual.step, 0, None), 0.0)
    left = left - first
    most = np.where(first > 0, raw.steps * (usual.step - usual.work), np.inf)  # the rest is `first`
    data = np.minimum(np.minimum(raw.data, most), left)
    work = left - data
    excess = work - raw.steps * usual.work
    stalled = ~early & (excess > STALL_SECONDS) & (work > STALL_FACTOR * raw.steps * usual.work)
    stalls = np.where(stalled, excess, 0.0)
    work = work - stalls
    # What the step itself does not account for. A damaged line before it has hidden its share.
    known = ~early & ~stalled & (raw.steps == 1) & ~np.isnan(raw.own)
    other = np.where(known, np.clip(work - np.clip(raw.own - data, 0, None), 0, None), 0.0)
    return Steps(
        raw.step, raw.segment, first, work - other, data, raw.checkpoint, raw.evaluation,
        stalls, other, *_restoring(attempt, raw),
    )  # fmt: skip


def _restoring(attempt: Attempt, raw: _Raw) -> tuple[list[float], float]:
    """Seconds before each rollback's new beginning since the last step, and where all this ends."""
    if not attempt.begins:
        return [], -math.inf
    found, end = [], attempt.begins[0][1]
    for segment, (_, began) in enumerate(attempt.begins):
        if segment:
            found.append(max(0.0, began - end))
        own = raw.ends[raw.segment == segment]
        end = max(end, began, float(own.max(initial=-math.inf)))
    return found, end


def has_stalled(seconds: float, usual: float) -> bool:
    """Whether a step that has gone on for so long has stalled."""
    return seconds > STALL_FACTOR * usual and seconds - usual > STALL_SECONDS
