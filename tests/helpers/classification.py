"""A small classification task: images of three colours, in folders, and its runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from helpers.small import small_tree
from helpers.transfer import train_and_resume_task, train_task
from m3i_scale.cluster.launch import World
from m3i_scale.config.classification import Classification

TREE = """
task: classification
run: small
model:
  backbone: {name: vit, options: {width: 32, depth: 2, heads: 2, pool_heads: 2, embed_dim: 16,
                                  drop_path_rate: 0.2}}
  classes: 3
data: {image_size: 32, workers: 0}
optimizer: {global_batch_size: 8, max_micro_batch: 2, duration: 4 steps, warmup: 1 steps,
            learning_rate: 3.0e-3, layer_decay: 0.75, average: 0.9}
checkpoint: {every: 2 steps}
engine: {precision: fp32, device: cpu}
logging: {trackers: [], pictures: false}
"""
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def draw_images(folder: Path) -> Path:
    """Folders `train` and `test` of 6 and 3 images a class."""
    draw = random.Random(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixel = tuple(channel + draw.randint(-40, 40) for channel in colour)
                Image.new("RGB", (40, 36), pixel).save(folder / split / name / f"{number}.png")
    return folder


def small_classification(
    images: Path, folder: Path, overrides: Mapping[str, Any] | None = None
) -> Classification:
    """The configuration, with keys `a.b` changed."""
    own: dict[str, Any] = {
        f"data.{split}": {"folder": str(images / split)} for split in ("train", "test")
    }
    own |= {"folder": str(folder), **(overrides or {})}
    return Classification.model_validate(small_tree(TREE, own))


def train_classifier(
    world: World, folder: Path, images: str, overrides: dict[str, Any], resume: str = "never"
) -> dict[str, Any]:
    """As `train_task`."""
    return train_task(world, small_classification(Path(images), folder, overrides), resume)


def train_and_resume_classifier(
    world: World, folder: Path, images: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """As `train_and_resume_task`."""
    return train_and_resume_task(
        folder, partial(train_classifier, world, folder, images, overrides)
    )
