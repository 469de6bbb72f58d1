"""Runs of the tasks that learn from labels, boxes or masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.training import full_weights, train
from m3i_scale.cluster.launch import World
from m3i_scale.config import RunConfig
from m3i_scale.engine import loop, session
from m3i_scale.tasks import task_of


def train_task(world: World, config: RunConfig, resume: str) -> dict[str, Any]:
    """Train to the end; the weights, their averages if there are any, and a last evaluation."""
    task = task_of(config)
    stream = task.open_stream()
    run = session.open_run(
        task, world, stream, epoch_samples=stream.samples, resume=resume,
        sources=stream.identities(),
    )  # fmt: skip
    finished, averaged = train(run), run.sharded.teacher
    assert (averaged is not None) == task.averages
    return {
        "finished": finished,
        "averages": {n: part.clone() for n, part in averaged.averages.items()} if averaged else {},
        "evaluation": loop.evaluate(run),
        "weights": full_weights(run),
    }


def train_and_resume_task(folder: Path, train_once: Callable[[str], Any]) -> dict[str, Any]:
    """To the end, and the second half once more from the checkpoint after the second step.

    `train_once` trains the run `small` below `folder` and is told what to resume from.
    """
    middle = folder / "small" / "checkpoints" / "step-00000002"
    return {"whole": train_once("never"), "resumed": train_once(str(middle))}
