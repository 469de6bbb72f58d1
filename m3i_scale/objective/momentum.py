"""The momentum (EMA) rule of the teacher: theta' <- m theta' + (1 - m) theta."""

from __future__ import annotations

import math


def ema_coefficient(step: int, total_steps: int, start: float, final: float) -> float:
    """`m` of step `step` (0-based): cosine from `start` to `final` (Table 7: 0.995 to 1)."""
    progress = min(step, total_steps) / max(total_steps, 1)
    return final - (final - start) * (1 + math.cos(math.pi * progress)) / 2


TURNOVERS = 7.0  # of the teacher in a run with `by_length`: between 5 and 10 (docs/paper.md)


def momentum_by_length(total_steps: int, final: float) -> float:
    """The `start` at which `turnovers` is about TURNOVERS; 0 where the run is too short for it.

    The mean of `1 - m` over a half cosine is that of its ends.
    """
    return max(0.0, 2 - final - 2 * TURNOVERS / max(total_steps, 1))


def turnovers(total_steps: int, start: float, final: float) -> tuple[float, float]:
    """How often the teacher forgets its start, and what share of the initial weights remains.

    The sum of `1 - m` and the product of `m` over all steps.
    """
    forgotten, remaining = 0.0, 1.0
    for step in range(total_steps):
        m = ema_coefficient(step, total_steps, start, final)
        forgotten, remaining = forgotten + 1 - m, remaining * m
    return forgotten, remaining
