"""`--dry-run` says how many images a transfer task is tested on."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import coco
from helpers.classification import draw_images, small_classification
from helpers.segmentation import draw_squares, small_segmentation
from m3i_scale.engine.schedules import split_batch
from m3i_scale.tasks import task_of


def detection(images: Path, folder: Path):
    coco.write(images, coco.content(6))
    return coco.small_detection(images, folder, "dino")


KINDS = {
    "classification": lambda images, folder: small_classification(draw_images(images), folder),
    "detection": detection,
    "segmentation": lambda images, folder: small_segmentation(draw_squares(images), folder),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_tested_on_are_counted(tmp_path: Path, kind: str):
    images = tmp_path / "images"
    images.mkdir()
    task = task_of(KINDS[kind](images, tmp_path))
    task.open_stream()
    count = len(task.tested)
    assert count > 0
    said = list(task.notes(task.networks(), split_batch(4, 4, 1, even=False), 1, 10))
    assert said == [f"tested on {count:,} images"]
