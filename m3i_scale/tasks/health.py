"""What a run warns of while it goes on: features that collapse, a weight out of all proportion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from m3i_scale.engine.averages import RunningMean
from m3i_scale.objective.balance import UNUSUAL

FIRST_STEPS = 5  # over which the rank that a run starts with is averaged


class Health:
    """Says in one sentence, once in a process, what a user should look at.

    Attributes:
        start_rank: effective rank of the student's features at the start of the run, for
            checkpoints.
    """

    start_rank: float | None = None

    def __init__(self) -> None:
        self._rank = RunningMean(0.9)
        self._said: set[str] = set()

    def warnings(self, values: Mapping[str, float], step: int) -> Iterator[str]:
        """Take in the figures of a step."""
        yield from self._once("rank", self._rank_warning(values.get("student/rank"), step))
        yield from self._once("lambda", _lambda_warning(values["balance/lambda"]))

    def _once(self, what: str, sentence: str | None) -> Iterator[str]:
        if sentence is not None and what not in self._said:
            self._said.add(what)
            yield sentence

    def _rank_warning(self, rank: float | None, step: int) -> str | None:
        if rank is None or not math.isfinite(rank):
            return None
        before = self.start_rank
        if before is None or step < FIRST_STEPS:
            self.start_rank = rank if before is None else (before * step + rank) / (step + 1)
        self._rank.add(rank)
        now, start = self._rank.mean, self.start_rank or rank
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
