"""What a task of an evaluation gives, and the count of right answers over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3i_scale.transfer import labels
from m3i_scale.transfer.features import Encoded
from m3i_scale.transfer.parts import sum_of_all

_CHUNK = 1024  # queries that are judged at once
Scorer = Callable[[Tensor], Tensor]  # something of n queries -> scores (n, C)


class Score(NamedTuple):
    """The accuracy of several networks in one task."""

    task: str  # as the table calls it
    key: str  # as metrics call it
    accuracy: dict[str, float]  # share of the queries, by the networks' names
    chance: float
    queries: int
    labels: int


class Judge:
    """Counts right answers over all ranks, each of which judges the queries it has encoded."""

    def __init__(self, encoded: Mapping[str, Encoded], device: torch.device) -> None:
        self._own = next(iter(encoded.values())).own
        self._device = device

    def shares(
        self,
        scores_of: Scorer,
        wanted: Tensor,
        truth: Tensor,
        depths: Sequence[int] = (1,),
    ) -> list[float]:
        """Share of queries whose label is among the k best, for each k (a collective).

        Args:
            scores_of: rows of own queries, int64 (n,), numbered among all -> scores (n, C).
            wanted: int64 (M,): the queries with a label.
            truth: int64 (M,): their labels.
            depths: k.
        """
        own = (wanted >= self._own.start) & (wanted < self._own.stop)
        counts = torch.zeros(len(depths), dtype=torch.int64)
        parts = zip(wanted[own].split(_CHUNK), truth[own].split(_CHUNK), strict=True)
        for rows, answers in parts if own.any() else ():
            scores = scores_of(rows)
            counts += torch.stack([labels.hits(scores, answers, k).sum() for k in depths])
        return [count / len(truth) for count in sum_of_all(counts, self._device).tolist()]


def of_own_rows(scorer: Scorer, values: Tensor, own: range, rows: Tensor) -> Tensor:
    """Scores of some rows, which this rank has encoded."""
    return scorer(values[rows - own.start])


def given(value: Tensor | None) -> Tensor:
    """What networks were seen to have."""
    assert value is not None
    return value
