"""Small runs for the engine's tests: a stream of random samples, and what the processes do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from small import SMALL, random_batch

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.data.batch import Batch
from m3i_scale.engine import loop, metrics, session
from m3i_scale.engine.stop import StopFlag


class RandomStream:
    """Samples that are functions of their position; the image at position `poison` is infinite."""

    epoch_samples = 64

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
        while end is None or position < end:
            yield random_batch(micro_batch, start=position)
            position += micro_batch * world_size


def small_config(folder: Path, overrides: dict[str, Any]) -> Config:
    """The small configuration with its runs under `folder`; keys of `overrides` are `a.b`."""
    tree = yaml.safe_load(SMALL)
    tree["folder"] = str(folder)
    for path, value in overrides.items():
        node = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return Config.model_validate(tree)


def open_small(
    world: World,
    folder: Path,
    overrides: dict[str, Any],
    resume: str = "auto",
    accept: Sequence[str] = (),
) -> loop.Run:
    """A run on random samples, ready to start or to go on, with changed keys if accepted."""
    config = small_config(folder, overrides)
    stream = RandomStream()
    return session.open_run(
        config,
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
    if run.sharded.teacher is not None and run.config.engine.teacher == "whole":
        for name, parameter in run.sharded.teacher.teacher.named_parameters():
            weights[f"teacher.{name}"] = parameter.detach().clone()
    return weights


def train_small(
    world: World, folder: Path, overrides: dict[str, Any], resume: str = "auto"
) -> dict[str, Any]:
    """Train to the end; the final weights and the metrics."""
    run = open_small(world, folder, overrides, resume)
    record = metrics.MetricLog(
        run.folder,
        is_main=world.is_main,
        total=run.schedule.total,
        first=run.progress.step,
        tensorboard=False,
    )
    finished = loop.pretrain(run, StopFlag(), record)
    record.close()
    return {"finished": finished, "weights": full_weights(run), "step": run.progress.step}
