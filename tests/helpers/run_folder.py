"""Finished runs on disk, made in a moment: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.shards import caption
from helpers.small import small_config
from m3i_scale.config import Config, dump_config
from m3i_scale.engine import checkpoint
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.models.tokenizer import train_wordpiece
from m3i_scale.objective.m3i import M3I


class FinishedRun(NamedTuple):
    """A run folder, its configuration and the networks whose weights are in its checkpoints."""

    config: Config
    made: M3I
    path: Path

    def reader(self, step: int) -> CheckpointReader:
        """The checkpoint of a step."""
        return CheckpointReader(self.path / "checkpoints" / f"step-{step:08d}")


def finished_run(folder: Path) -> FinishedRun:
    """The small configuration's run: checkpoints of three ranks after the steps 4 and 7."""
    config = captioned_config(folder)
    made = networks(config, seed=3)
    return FinishedRun(config, made, write_run(config, made, steps=(4, 7), ranks=3))


def captioned_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The small configuration with a tokenizer of the captions of `shards.write_images`."""
    tokenizer = folder / "tokenizer.json"
    train_wordpiece([caption(n) for n in range(40)], 50, tokenizer)
    return small_config(folder, {"model.text.tokenizer": str(tokenizer), **(overrides or {})})


def networks(config: Config, seed: int) -> M3I:
    """Networks that some training might have led to."""
    torch.manual_seed(seed)
    made = M3I(config.model, config.objective, config.data.image_size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def write_run(config: Config, made: M3I, *, steps: Iterable[int] = (7,), ranks: int = 2) -> Path:
    """A run folder as training leaves it."""
    folder = config.run_folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [{"step": n, "loss/total": 3.0 - n, "learning_rate": 0.1} for n in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        write_checkpoint(folder / "checkpoints", made, step, ranks)
    return folder


def write_checkpoint(folder: Path, made: M3I, step: int, ranks: int) -> Path:
    """The weights of networks as a complete checkpoint of `ranks` ranks."""
    trained = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}
    tensors = {f"weight/{name}": value for name, value in trained.items()}
    if hasattr(made, "teacher"):
        averages = made.teacher.named_parameters()
        tensors |= {f"teacher/student.{name}": p.detach() for name, p in averages}
    state = {
        "step": step,
        "ranks": ranks,
        "shapes": {name: list(value.shape) for name, value in trained.items()},
    }
    writes = [
        checkpoint.begin_write(folder, step, rank, ranks, shard(tensors, rank, ranks), state)
        for rank in range(ranks)
    ]
    for write in writes:
        write.thread.join()
        assert not write.failure
    return checkpoint.publish(writes[0], ranks)


def shard(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's slices of the flattened tensors."""
    own = {n: checkpoint.extent(t.numel(), rank, ranks) for n, t in tensors.items()}
    return {n: t.flatten()[own[n].start : own[n].stop].clone() for n, t in tensors.items()}
