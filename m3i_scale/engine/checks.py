"""What a run does against errors that nobody sees: when, and what follows.

- Every step: nothing has changed between two updates, and what ranks hold alike is alike (`guard`).
- Every `engine.verify.every` steps: the step is computed twice (`verify`).
- Checkpoints: what was copied is what was written (`checkpoint`) and what is read (`state`).

An error ends the run after its step was logged, with exit code 89 and before anything is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.config import Verify
from m3i_scale.engine.corruption import CorruptionError, listed, places
from m3i_scale.engine.guard import Guard
from m3i_scale.engine.passes import Passed, Passes
from m3i_scale.engine.verify import Recomputation


class Checks:
    """The checks of a run from here on.

    Args:
        spec: `engine.verify`.
        passes: a step's passes.
        deterministic: `engine.deterministic`.

    Attributes:
        problem: what ends the run.
        errors: how many were found.
    """

    def __init__(self, spec: Verify, passes: Passes, *, deterministic: bool) -> None:
        sharded, self._world = passes.sharded, passes.world
        self._passes, self._every = passes, spec.every
        self.problem: CorruptionError | None = None
        self._first = True
        self.errors = 0
        self._guard = None
        if spec.state:
            self._guard = Guard(sharded.shards, sharded.teacher, sharded.model, self._world.device)
        exact = deterministic or self._world.device.type == "cpu"
        self._twice = Recomputation(passes, always_exact=exact)

    def compute(self, step: int, batches: Iterator[Any]) -> Passed:
        """A step's passes, twice if it is the turn of `step`; up to the update."""
        if self._guard is not None:
            self._guard.check_buffers()
        if self._is_due(step) and self._twice.possible:
            passed, problem = self._twice.run(batches)
            self._note(problem)
        else:
            passed = self._passes.run(batches)
        if self._guard is not None:
            self._guard.check()
        return passed

    def _is_due(self, step: int) -> bool:
        """Also the first step on GPUs: kernels and memory that it needs are then known at once."""
        first, self._first = self._first, False
        if self._every is None:
            return False
        return (step + 1) % self._every == 0 or (first and self._world.device.type == "cuda")

    def report(self) -> list[float | Tensor]:
        """Two numbers of this rank, for `judge`."""
        return [0.0, 0.0] if self._guard is None else [*self._guard.report()]

    def judge(self, reports: Tensor) -> None:
        """What the numbers of all ranks say: float64 (ranks, 2); a collective if it is bad."""
        found = self._guard.verdict(reports) if self._guard is not None else {}
        if found and self.problem is None:
            self._note(self._error(found))

    def accept(self) -> None:
        """The state is what it should be: after an update, or after it was loaded."""
        if self._guard is not None:
            self._guard.store()

    def look_again(self) -> None:
        """Before a checkpoint and an evaluation (a collective, a wait for the device)."""
        if self._guard is None:
            return
        self._guard.check()
        reports = torch.zeros(self._world.size, 2, dtype=torch.float64, device=self._world.device)
        reports[self._world.rank] = torch.stack(self._guard.report()).to(reports)
        if self._world.size > 1:
            dist.all_reduce(reports)
        self.judge(reports.cpu())

    def values(self, damaged_copies: int) -> dict[str, float]:
        """For the metrics; `damaged_copies` of checkpoints were not written."""
        return {
            "verify/steps_computed_twice": self._twice.steps,
            "verify/errors": self.errors + damaged_copies,
        }

    def _note(self, problem: CorruptionError | None) -> None:
        if problem is not None:
            self.errors += 1
            self.problem = self.problem or problem

    def _error(self, found: Mapping[int, Sequence[str]]) -> CorruptionError:
        where = places(self._world)
        said = listed({rank: ", ".join(words) for rank, words in found.items()}, where)
        nodes = {where[rank].node for rank in found}
        everywhere = len(nodes) > 1 and nodes == {place.node for place in where}
        return CorruptionError(said, () if everywhere else nodes)
