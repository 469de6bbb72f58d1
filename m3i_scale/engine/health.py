"""What a run warns of while it goes on: features that collapse, a weight out of all proportion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from m3i_scale.engine.state import Progress
from m3i_scale.objective.balance import UNUSUAL

FIRST_STEPS = 5  # over which the rank that a run starts with is averaged


class Health:
    """Says in one sentence, once in a process, what a user should look at."""

    def __init__(self) -> None:
        self._rank = RunningMean(0.9)
        self._said: set[str] = set()

    def warnings(self, values: Mapping[str, float], progress: Progress) -> Iterator[str]:
        """Take in the figures of step `progress.step`; sets `progress.start_rank` at the start."""
        yield from self._once("rank", self._rank_warning(values.get("student/rank"), progress))
        yield from self._once("lambda", _lambda_warning(values["balance/lambda"]))

    def _once(self, what: str, sentence: str | None) -> Iterator[str]:
        if sentence is not None and what not in self._said:
            self._said.add(what)
            yield sentence

    def _rank_warning(self, rank: float | None, progress: Progress) -> str | None:
        if rank is None or not math.isfinite(rank):
            return None
        step = progress.step
        if progress.start_rank is None or step < FIRST_STEPS:
            before = progress.start_rank
            progress.start_rank = rank if before is None else (before * step + rank) / (step + 1)
        self._rank.add(rank)
        now, start = self._rank.mean, progress.start_rank
        if step < FIRST_STEPS or now >= start / 2:
            return None
        return (
            f"the effective rank of the student's pooled features is {now:.2f}, less than half of "
            f"the {start:.2f} it started with: the encoder may collapse; see student/rank in the "
            "metrics, and objective.targets.N.centre, model.decoder.head, optimizer.learning_rate "
            "and optimizer.teacher_momentum"
        )


def _lambda_warning(weight: float) -> str | None:
    if weight <= UNUSUAL:
        return None
    return (
        f"lambda, the weight of the supervised loss, is {weight:.3g}, above {UNUSUAL:g}: its "
        "gradient has all but vanished beside the self-supervised one; objective.balance.maximum "
        "bounds it"
    )


class RunningMean:
    """A moving average, over about a hundred steps, and how far a value lies above it."""

    def __init__(self, decay: float = 0.99) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    @property
    def mean(self) -> float:
        """The average of what was added; each value counts `decay` times the one after it."""
        return self._sum / self._weight

    def add(self, value: float) -> None:
        """Take in a finite value."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    def ratio(self, value: float) -> float:
        """Value over the average of the finite values before it (1 before the tenth), taken in."""
        average = self.mean if self._weight else value
        early = self._weight < 1 - self._decay**10
        if math.isfinite(value):
            self.add(value)
        return 1.0 if early or not math.isfinite(value) else value / average
