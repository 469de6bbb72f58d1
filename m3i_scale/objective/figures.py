"""A group's loss with the figures that show its progress, each a pair (sum, count)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3i_scale.objective.collapse import effective_rank, spread


class Term(NamedTuple):
    """One group's loss (mean over the batch) and its figures, each a pair (sum, count)."""

    loss: Tensor
    figures: dict[str, Tensor]
    keys: Tensor | None = None  # (B, D): what the group's queue takes in, where it has one


def mean_term(terms: Sequence[Term]) -> Term:
    """The mean of a group's losses over several inputs of the same samples."""
    figures = {name: sum(t.figures[name] for t in terms) for name in terms[0].figures}
    keys = [term.keys for term in terms if term.keys is not None]
    loss = sum((term.loss for term in terms[1:]), terms[0].loss) / len(terms)
    return Term(loss, figures, torch.cat(keys) if keys else None)  # type: ignore[arg-type]


def collapse_figures(
    z_hat: Tensor, targets: Tensor | None = None, present: Tensor | None = None
) -> dict[str, Tensor]:
    """Spread and effective rank of predictions and, where they are given, of targets.

    Both are (B, ..., D); rows where `present` (B,) is False do not count.
    """
    enough = torch.ones((), device=z_hat.device)
    if present is not None:
        enough = (present.sum() > 1).float()
    sides = {"_prediction": z_hat} | ({} if targets is None else {"": targets})
    return {
        f"{name}{side}": figure(function(vectors.detach(), present) * enough, enough)
        for side, vectors in sides.items()
        for name, function in (("spread", spread), ("rank", effective_rank))
    }


def student_figures(features: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Rank and spread of z_x (B, N, D), pooled: the mean of the tokens of image i, seen (B, N)."""
    weight = seen.to(features.dtype)
    pooled = (weight[:, None] @ features.detach())[:, 0] / weight.sum(1, keepdim=True)  # (B, D)
    return {
        "student/rank": figure(effective_rank(pooled)),
        "student/spread": figure(spread(pooled)),
    }


def figure(value: Tensor, count: int | Tensor = 1) -> Tensor:
    """A (sum, count) pair, so that means over ranks and steps are exact."""
    value = value.detach().float()
    if not isinstance(count, Tensor):
        count = torch.full_like(value, count)  # a tensor made of a number would wait for the GPU
    return torch.stack([value, count.float()])
