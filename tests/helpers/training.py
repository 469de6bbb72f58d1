"""Small runs for the engine's tests: a stream of random samples, and what the processes do."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from helpers.small import random_batch, small_config
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.data.batch import Batch
from m3i_scale.data.step_sizes import StepSizes
from m3i_scale.engine import loop, metrics, session
from m3i_scale.engine.memory import held_memory
from m3i_scale.engine.state import snapshot
from m3i_scale.engine.stop import StopFlag
from m3i_scale.objective.m3i import M3I
from m3i_scale.tasks.pretraining import Pretraining


class RandomStream:
    """Samples that are functions of their position, of a configuration's sizes or 64 pixels."""

    epoch_samples = 64
    sizes: StepSizes | None = None

    def __init__(self, config: Config | None = None) -> None:
        if config is not None:
            batch = config.optimizer.global_batch_size
            self.sizes = StepSizes(config.data, config.seed, batch)

    def loader(
        self,
        *,
        start: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        end: int | None,
        pin_memory: bool,
    ) -> Iterator[Batch]:
        position = start + rank * micro_batch
        drawn = self.sizes and self.sizes.of_micro_steps(start, micro_batch * world_size)
        for size in drawn or itertools.repeat(64):
            if end is not None and position >= end:
                return
            yield random_batch(micro_batch, start=position, image_size=size)
            position += micro_batch * world_size


def open_small(
    world: World,
    folder: Path,
    overrides: dict[str, Any],
    resume: str = "auto",
    accept: Sequence[str] = (),
    measured: bool = False,
) -> loop.Run:
    """A run on random samples, ready to start or to go on, with changed keys if accepted.

    Only a `measured` run counts the operations of its step, for the metrics of the machine: for
    that rank 0 traces the step, which takes longer than to train, and all others wait.
    """
    config = small_config(folder, overrides)
    stream = RandomStream(config)
    speed = session._speed if measured else lambda *_, **__: None
    with mock.patch.object(session, "_speed", speed):
        return session.open_run(
            Pretraining(config),
            world,
            stream,
            epoch_samples=stream.epoch_samples,
            resume=resume,
            accept=accept,
        )


def full_weights(run: loop.Run) -> dict[str, torch.Tensor]:
    """All parameters in full, gathered (a collective), a whole teacher's among them."""
    import deepspeed

    weights = {}
    for name, parameter in run.sharded.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    teacher = run.sharded.teacher.teacher if run.sharded.teacher else None
    if teacher is not None and run.config.engine.teacher == "whole":
        for name, parameter in teacher.named_parameters():
            weights[f"teacher.{name}"] = parameter.detach().clone()
    return weights


def open_log(run: loop.Run) -> metrics.MetricLog:
    """The metrics of a run from its next step on; close it after training."""
    return metrics.MetricLog(
        run.folder,
        is_main=run.world.is_main,
        total=run.schedule.total,
        first=run.progress.step,
    )


def train(run: loop.Run) -> bool:
    """Train to the end, with metrics; whether the end was reached."""
    record = open_log(run)
    try:
        return loop.train_to_end(run, StopFlag(), record)
    finally:
        record.close()


def train_small(
    world: World,
    folder: Path,
    overrides: dict[str, Any],
    resume: str = "auto",
    measured: bool = False,
) -> dict[str, Any]:
    """Train to the end; the final weights and the metrics."""
    run = open_small(world, folder, overrides, resume, measured=measured)
    finished = train(run)
    return {"finished": finished, "weights": full_weights(run), "step": run.progress.step}


def train_and_resume(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Four steps; then the last two once more, from the checkpoint after the second.

    Returns for `whole` and `resumed` what the run then holds: weights in full, this rank's part of
    the teacher's averages, running centres, queues, and whether the pooling is trained.
    """
    changes = {"optimizer.duration": "4 steps", "checkpoint.every": "2 steps"} | overrides
    kept = folder / "small" / "checkpoints" / "step-00000002"
    found = {}
    for name, resume in (("whole", "never"), ("resumed", str(kept))):
        run = open_small(world, folder, changes, resume)
        train(run)
        found[name] = _state(run)
    return found


def _state(run: loop.Run) -> dict[str, Any]:
    model, task = run.sharded.model, run.task
    assert isinstance(model, M3I)
    assert isinstance(task, Pretraining)
    tensors, _ = snapshot(run.sharded, run.world, run.progress, task)
    pooling = model.student.backbone.pooling
    return {
        "weights": full_weights(run),
        "averages": {n: t.clone() for n, t in tensors.items() if n.startswith("teacher/")},
        "centres": _buffers(model.running_centres, "averages"),
        "keys": _buffers(model.queues, "keys"),
        "filled": _buffers(model.queues, "filled"),
        "pooling_trained": any(p.requires_grad for p in pooling.parameters()),
        "start_rank": task.health.start_rank,
        "held": held_memory(run.sharded),
    }


def _buffers(modules: nn.ModuleDict, name: str) -> dict[str, torch.Tensor]:
    return {key: module.get_buffer(name).clone() for key, module in modules.items()}


def curve(folder: Path, name: str = "loss/total") -> dict[int, float]:
    """A metric of the run `small` under `folder` by step; steps that ran twice must agree."""
    found: dict[int, float] = {}
    for line in (folder / "small" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        first = found.setdefault(values["step"], values[name])
        assert first == values[name] or math.isnan(values[name]), f"step {values['step']}"
    return found
