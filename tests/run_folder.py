"""Finished runs and indexed images on disk, made in a moment: for tests of what reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from small import SMALL
from torch import Tensor

from m3i_scale.config import Config, dump_config
from m3i_scale.engine import checkpoint
from m3i_scale.models.tokenizer import train_wordpiece
from m3i_scale.objective.m3i import M3I
from m3i_scale.shards.indexing import index_shards

THINGS, CATEGORIES = 6, 5


def small_config(folder: Path, **changes: Any) -> Config:
    """The small configuration, with a tokenizer of the captions below."""
    tree = yaml.safe_load(SMALL)
    tree |= {"folder": str(folder), **changes}
    if tree["model"].get("text"):
        tokenizer = folder / "tokenizer.json"
        train_wordpiece([caption(n) for n in range(40)], 50, tokenizer)
        tree["model"]["text"]["tokenizer"] = str(tokenizer)
    return Config.model_validate(tree)


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
    own = {n: checkpoint.extent(t.numel(), rank, ranks) for n, t in tensors.items()}
    return {n: t.flatten()[own[n].start : own[n].stop].clone() for n, t in tensors.items()}


def caption(number: int) -> str:
    return f"Thing {'abcdef'[number % THINGS]}, style {number % 4}"


def write_images(folder: Path, name: str, numbers: Iterable[int], kind: str) -> str:
    """An index of images that are functions of their number, some captioned, some classified."""
    folder.mkdir(exist_ok=True)
    shard_path = folder / f"{name}.tar"
    with tarfile.open(shard_path, "w") as tar:
        for number in numbers:
            members = {"jpg": jpeg(number)}
            if kind != "category":
                members["txt"] = caption(number).encode()
            if kind != "text":
                members["cls"] = str(number % CATEGORIES).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = folder / f"{name}.parquet"
    index_shards([str(shard_path)], str(index), kind=kind, progress=False)
    return str(index)


def jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((72, 64), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
