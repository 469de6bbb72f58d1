"""Moving averages of figures."""

from __future__ import annotations

import math


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
