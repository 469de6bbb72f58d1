"""The momentum (EMA) rule of the teacher: theta' <- m theta' + (1 - m) theta."""

from __future__ import annotations

import math


def ema_coefficient(step: int, total_steps: int, start: float, final: float) -> float:
    """`m` of step `step` (0-based): cosine from `start` to `final` (Table 7: 0.995 to 1)."""
    progress = min(step, total_steps) / max(total_steps, 1)
    return final - (final - start) * (1 + math.cos(math.pi * progress)) / 2
