"""When checkpoints are written, and how ranks agree on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.cluster.launch import World, gather_objects
from m3i_scale.config import ConfigError
from m3i_scale.engine import checkpoint, lineage
from m3i_scale.engine.checkpoint import CheckpointError, CheckpointReader, Write
from m3i_scale.engine.lineage import Lineage

log = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints in the background, one at a time.

    A checkpoint counts only when every rank has written its part; ranks learn that at step
    boundaries, through `poll`, so that no thread ever communicates.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_last: int,
        keep_every: int | None,
        background: bool,
    ) -> None:
        self.folder = folder
        self.last_good: Path | None = None
        self.damaged = 0  # checkpoints that were not written because a copy had changed
        # Told on rank 0 the step of a checkpoint and what happened on which ranks: a copy has
        # changed; it could not be written.
        self.on_damage: Callable[[int, str], None] | None = None
        self.on_failure: Callable[[int, str], None] | None = None
        self.lineage: Lineage | None = None  # of this start of training, on rank 0
        self._world = world
        self._keep = (keep_last, keep_every)
        self._background = background
        self._write: Write | None = None
        self._succeeded = True

    def remove_leftovers(self) -> None:
        """Remove what crashes have left; before training, when nobody writes."""
        if self._world.is_main:
            for path in checkpoint.remains(self.folder):
                checkpoint.remove(path)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        sums: Mapping[str, int] | None = None,
    ) -> None:
        """Start a checkpoint, after the one before has ended (on all ranks at the same step)."""
        self.finish()
        world = self._world
        self._write = checkpoint.begin_write(
            self.folder, step, world.rank, world.size, tensors, state, sums
        )
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint under way if every rank has written its part (a collective)."""
        if self._write is not None and not self._any_rank(not self._write.done):
            self._complete(self._write)

    def finish(self) -> bool:
        """Wait for the checkpoint under way (a collective); whether the last one succeeded."""
        if self._write is not None:
            self._write.thread.join()
            self._complete(self._write)
        return self._succeeded

    def _complete(self, write: Write) -> None:
        self._write = None
        if self._any_rank(bool(write.changed)):
            self.damaged += 1
            self._tell(self.on_damage, write.step, "; ".join(write.failure))
        problem = "; ".join(write.failure)
        if not self._any_rank(bool(problem)) and self._world.is_main:
            try:
                self.last_good = checkpoint.publish(write, self._world.size, self.lineage)
                checkpoint.prune(self.folder, *self._keep)
            except CheckpointError as error:
                problem = str(error)
        if problem:
            log.error("checkpoint of step %d failed: %s", write.step, problem)
        self._succeeded = not self._any_rank(bool(problem))
        if self._succeeded:
            self.last_good = checkpoint.step_folder(self.folder, write.step)
            return
        if self._world.is_main:
            checkpoint.remove(write.partial)
            log.error("the last good checkpoint is %s", self.last_good or "none")
        self._tell(self.on_failure, write.step, problem)

    def _tell(self, told: Callable[[int, str], None] | None, step: int, problem: str) -> None:
        words = problems_of_ranks(problem, self._world)
        if told is not None:
            told(step, words)

    def _any_rank(self, flag: bool) -> bool:
        return any_rank(flag, self._world)


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank (a collective)."""
    if world.size == 1:
        return flag
    value = torch.tensor([float(flag)], device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def problems_of_ranks(problem: str, world: World) -> str:
    """What the first ranks say that have a problem; empty ones have none (a collective)."""
    said = gather_objects(problem, world)
    words = [f"rank {rank}: {one}" for rank, one in enumerate(said) if one]
    return "; ".join(words[:4])


def newest_good(
    folder: Path,
    resume: str,
    world: World,
    on_damage: Callable[[int, str], None] | None = None,
) -> CheckpointReader | None:
    """Open the newest undamaged checkpoint for `--resume`; damaged ones are named and passed over.

    Args:
        folder: the run's checkpoints.
        resume: "auto", "never", or the path of a checkpoint, of a folder of them, or of a run.
        world: this rank.
        on_damage: told the step of each checkpoint that is passed over, and why.

    Raises:
        ConfigError: a checkpoint was asked for by path and it is damaged or not there.
        CheckpointError: there are checkpoints of this run and all of them are damaged.
    """
    resume = _of_a_restart(folder, resume, world)
    found = checkpoint.candidates(folder, resume)
    if resume == "auto":
        if world.is_main:
            _say_passed_over(folder)
        found = _agreed(found, folder, world)
    damaged = 0
    for path in found:
        problem = checkpoint.verify(path, world.rank, world.size)
        if not any_rank(problem is not None, world):
            return CheckpointReader(path)
        if problem:
            log.warning("damaged checkpoint: %s", problem)
        if resume != "auto":
            raise ConfigError(f"--resume {resume}: {path} is damaged; choose another one")
        if world.is_main:
            log.warning("%s is passed over, trying the one before", path)
        words = problems_of_ranks(problem or "", world)
        if on_damage is not None:
            on_damage(checkpoint.step_of(path), words)
        damaged += 1
    if damaged:
        raise CheckpointError(
            f"all {damaged} checkpoints in {folder} are damaged or cannot be read, as said above; "
            "mend the file system, resume another checkpoint with --resume PATH, or train from the "
            "beginning with --resume never, which sets them aside"
        )
    return None


def _say_passed_over(folder: Path) -> None:
    for path in checkpoint.remains(folder):
        log.warning("%s was never completed and is passed over", path)
    for path in checkpoint.strangers(folder):
        log.warning("%s is of another lineage and is passed over", path)


def _of_a_restart(folder: Path, resume: str, world: World) -> str:
    """`resume`, or "auto" if this is a restart of the job that has obeyed it already (collective).

    A scheduler starts a job again with the same words: `--resume never` must not begin anew at
    every restart, nor must a path go back to the same checkpoint.
    """
    if resume == "auto":
        return resume
    known = lineage.read_file(folder / lineage.FILE) if world.is_main else None
    job = lineage.this_job()
    again = known is not None and known.job == job and job is not None and lineage.restarts() > 0
    if not any_rank(again, world):
        return resume
    if world.is_main:
        log.warning("job %s has been restarted and goes on; --resume %s was for its first start",
                    job, resume)  # fmt: skip
    return "auto"


def _agreed(found: Iterator[Path], folder: Path, world: World) -> Iterator[Path]:
    """Rank 0's candidates: a folder that nodes share may look different on each for a while."""
    while True:
        path = next(found, None)
        step = torch.tensor([-1 if path is None else checkpoint.step_of(path)], device=world.device)
        if world.size > 1:
            dist.broadcast(step, src=0)
        if step.item() < 0:
            return
        yield checkpoint.step_folder(folder, int(step.item()))
