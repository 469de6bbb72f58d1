"""A small segmentation task: squares of two colours on grey, and its runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.small import small_tree
from helpers.transfer import train_and_resume_task, train_task
from m3i_scale.cluster.launch import World
from m3i_scale.config.segmentation import Segmentation

TREE = """
task: segmentation
run: small
model:
  backbone: {name: vit, options: {width: 16, depth: 2, heads: 2, pool_heads: 2, embed_dim: 8,
                                  patch_size: 8, drop_path_rate: 0.2, position_grid: 4}}
  classes: 3
  head: {kind: upernet, width: 16, auxiliary_width: 16, pool_scales: [1, 2]}
data: {crop: 32, workers: 0, augmentation: {short_side: 32, long_side: 64}}
optimizer: {global_batch_size: 4, max_micro_batch: 1, duration: 4 steps, warmup: 1 steps,
            learning_rate: 3.0e-3, layer_decay: 0.75}
evaluation: {short_side: 32, long_side: 64, pictures: 2}
checkpoint: {every: 2 steps}
engine: {precision: fp32, device: cpu}
logging: {trackers: [], pictures: false}
"""
MASK2FORMER = {
    "kind": "mask2former",
    "width": 32,
    "heads": 2,
    "queries": 4,
    "encoder_layers": 1,
    "encoder_ffn": 32,
    "decoder_layers": 1,
    "decoder_ffn": 32,
    "points": 32,
}


def draw_squares(folder: Path) -> Path:
    """Images and masks of 6 training and 3 test pictures; the first has no labelled pixel."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for part in ("images", "masks"):
            (folder / part / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((40, 48, 3), 128, np.uint8)
            mask = np.zeros((40, 48), np.uint8)
            for kind, colour in ((1, (220, 60, 60)), (2, (60, 60, 220))):
                top, left = rng.integers(0, 24, 2)
                pixels[top : top + 14, left : left + 14] = colour
                mask[top : top + 14, left : left + 14] = kind
            mask = np.full_like(mask, 255) if split == "train" and not number else mask
            Image.fromarray(pixels).save(folder / f"images/{split}/{number}.png")
            Image.fromarray(mask).save(folder / f"masks/{split}/{number}.png")
    return folder


def small_segmentation(
    squares: Path, folder: Path, overrides: Mapping[str, Any] | None = None
) -> Segmentation:
    """The configuration, with keys `a.b` changed."""
    own: dict[str, Any] = {
        f"data.{split}": {part: str(squares / part / split) for part in ("images", "masks")}
        for split in ("train", "test")
    }
    own |= {"folder": str(folder), **(overrides or {})}
    return Segmentation.model_validate(small_tree(TREE, own))


def train_segmenter(
    world: World, folder: Path, squares: str, overrides: dict[str, Any], resume: str = "never"
) -> dict[str, Any]:
    """As `train_task`."""
    return train_task(world, small_segmentation(Path(squares), folder, overrides), resume)


def train_and_resume_segmenter(
    world: World, folder: Path, squares: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """As `train_and_resume_task`."""
    return train_and_resume_task(
        folder, partial(train_segmenter, world, folder, squares, overrides)
    )
