"""A small classification task: images of three colours, in folders, and its runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from helpers.training import full_weights
from m3i_scale.cluster.launch import World
from m3i_scale.config.classification import Classification
from m3i_scale.engine import loop, metrics, session
from m3i_scale.engine.stop import StopFlag
from m3i_scale.tasks import task_of

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
    tree = yaml.safe_load(TREE)
    tree["folder"] = str(folder)
    for split in ("train", "test"):
        tree["data"][split] = {"folder": str(images / split)}
    for path, value in (overrides or {}).items():
        node = tree
        *above, last = path.split(".")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return Classification.model_validate(tree)


def train_classifier(
    world: World, folder: Path, images: str, overrides: dict[str, Any], resume: str = "never"
) -> dict[str, Any]:
    """Train to the end; the weights, their averages, and the figures of the last step."""
    task = task_of(small_classification(Path(images), folder, overrides))
    stream = task.open_stream()
    run = session.open_run(
        task, world, stream, epoch_samples=stream.samples, resume=resume,
        sources=stream.identities(),
    )  # fmt: skip
    record = metrics.MetricLog(
        run.folder, is_main=world.is_main, total=run.schedule.total, first=run.progress.step
    )
    finished = loop.train_to_end(run, StopFlag(), record)
    record.close()
    assert run.sharded.teacher is not None
    averages = {name: part.clone() for name, part in run.sharded.teacher.averages.items()}
    found = loop.evaluate(run)
    return {
        "finished": finished,
        "weights": full_weights(run),
        "averages": averages,
        "evaluation": found,
    }


def train_and_resume_classifier(
    world: World, folder: Path, images: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """To the end, and the second half once more from the checkpoint in the middle."""
    middle = folder / "small" / "checkpoints" / "step-00000002"
    return {
        name: train_classifier(world, folder, images, overrides, resume)
        for name, resume in (("whole", "never"), ("resumed", str(middle)))
    }
