"""Which side the views of a step have: a function of the seed and the step's stream position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from m3i_scale.config import Data
from m3i_scale.data.order import hash64

_PURPOSE = 0x512E  # other draws of the same seed and position


class StepSizes:
    """Draws a size for every step by the weights of `data.mixed_sizes`.

    All micro-batches of all ranks in a step have the same, and a step has it whatever the number of
    ranks, and wherever a run was resumed.

    Args:
        data: the sizes.
        seed: of the run.
        batch: samples of a step; needed where there are several sizes.

    Raises:
        ValueError: it is not given there.
    """

    def __init__(self, data: Data, seed: int, batch: int | None) -> None:
        if data.mixed_sizes is not None and batch is None:
            raise ValueError("data.mixed_sizes draws a size for each step: say a step's samples")
        self.sizes, self.seed, self.batch = tuple(data.sizes), seed, batch or 1
        self._ends = np.cumsum(list(data.sizes.values()))

    @property
    def largest(self) -> int:
        """The largest side."""
        return self.sizes[-1]

    def of_step(self, position: int) -> int:
        """The side of the step whose first sample is at `position`."""
        if len(self.sizes) == 1:
            return self.largest
        drawn = float(hash64(self.seed, _PURPOSE, position)[0]) / 2.0**64
        chosen = int(np.searchsorted(self._ends, drawn, side="right"))
        return self.sizes[min(chosen, len(self.sizes) - 1)]

    def of_micro_steps(self, start: int, samples: int) -> Iterator[int]:
        """The sides of micro-steps of that many samples on all ranks; a step begins at `start`."""
        for number in itertools.count():
            yield self.of_step(start + number * samples // self.batch * self.batch)
