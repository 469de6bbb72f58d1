"""Small detection sets on disk, and small detectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from helpers.small import small_tree
from helpers.transfer import train_and_resume_task, train_task
from m3i_scale.cluster.launch import World
from m3i_scale.config.detection import CocoSet, Detection, DetectionData, Detector, Jitter
from m3i_scale.tasks.detection.batch import Batch, Objects, Sample, collate

INTERN_IMAGE = {
    "name": "intern_image",
    "options": {"channels": 8, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
}
VIT = {"name": "vit", "options": {"width": 32, "depth": 2, "heads": 2, "position_grid": 4}}
MASK_RCNN = {
    "kind": "mask_rcnn",
    "width": 16,
    "box_hidden": 32,
    "box_convolutions": 1,
    "mask_convolutions": 1,
    "anchors": [8, 16, 32, 48, 64],
    "proposals": 20,
    "box_samples": 16,
    "proposal_samples": 16,
}
DINO = {
    "kind": "dino",
    "width": 16,
    "heads": 2,
    "ffn": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 14,
    "denoising": 8,
}
WINDOWS = {"size": 2, "global_blocks": [1]}
CATEGORIES = 5
# name -> backbone and head
DETECTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": (VIT, MASK_RCNN),
    "intern_image": (INTERN_IMAGE, MASK_RCNN),
    "dino": (INTERN_IMAGE, DINO),
    "composite": (INTERN_IMAGE, {**DINO, "composite": True}),
}


def detector(name: str, **options: Any) -> Detector:
    """The configuration of a small detector; options of its head."""
    backbone, head = DETECTORS[name]
    return Detector.model_validate(
        {
            "backbone": backbone,
            "head": {**head, **options},
            "windows": WINDOWS,
            "categories": CATEGORIES,
        }
    )


def data(folder: Path | str = "none", **options: Any) -> DetectionData:
    """The configuration of the set in a folder, its file `instances.json` and `images/`."""
    where = CocoSet(annotations=f"{folder}/instances.json", images=f"{folder}/images")
    sizes = {"resize": Jitter(size=64), "test_side": 64, "test_longest": 96}
    return DetectionData.model_validate({"train": where, "val": where, **sizes, **options})


def batch(objects: int, *, seed: int = 0) -> Batch:
    """Two images of different sizes with so many random objects each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, (height, width) in enumerate([(40, 64), (64, 48)]):
        corner = torch.rand(objects, 2, generator=generator) * 20
        sides = 8 + torch.rand(objects, 2, generator=generator) * 10
        boxes = torch.cat([corner, corner + sides], 1)
        masks = torch.zeros(objects, height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        labels = torch.randint(0, CATEGORIES, (objects,), generator=generator)
        image = torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8)
        found = Objects(boxes, labels, masks)
        samples.append(Sample(image, found, number, (height * 2, width * 2), str(number)))
    return collate(samples)


def content(images: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """A COCO file: odd category ids, polygons, run lengths, a crowd, an image without objects."""
    generator = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        height, width = 40 + 8 * (number % 4), 72 - 8 * (number % 4)
        name = f"{number}.png"
        entries.append({"id": 100 + number, "file_name": name, "height": height, "width": width})
        for _ in range(0 if number == 1 else 3):
            left, top = generator.integers(0, width - 24), generator.integers(0, height - 24)
            wide, high = generator.integers(6, 22, 2)
            box = [float(left), float(top), float(wide), float(high)]
            annotations.append(
                {
                    "id": len(annotations) + 7,
                    "image_id": 100 + number,
                    "category_id": [3, 9, 40][int(generator.integers(3))],
                    "bbox": box,
                    "area": float(wide * high),
                    "iscrowd": 0,
                    "segmentation": polygon(box),
                }
            )
    if images > 2:
        annotations[-1] |= {"iscrowd": 1, "segmentation": run_lengths(entries[-1], annotations[-1])}
    categories = [{"id": 40, "name": "cup"}, {"id": 3, "name": "car"}, {"id": 9, "name": "boat"}]
    return {"images": entries, "annotations": annotations, "categories": categories}


def polygon(box: list[float]) -> list[list[float]]:
    """The four corners of COCO's box."""
    left, top, wide, high = box
    right, bottom = left + wide, top + high
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(image: dict[str, Any], annotation: dict[str, Any]) -> dict[str, Any]:
    """The box of an annotation as uncompressed run lengths."""
    left, top, wide, high = (int(value) for value in annotation["bbox"])
    mask = np.zeros((image["height"], image["width"]), bool)
    mask[top : top + high, left : left + wide] = True
    flat = np.concatenate([[False], mask.flatten(order="F"), [not mask[-1, -1]]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": [image["height"], image["width"]], "counts": counts}


def write(folder: Path, coco: dict[str, Any]) -> Path:
    """Write a set: noise as images, and `instances.json`, whose path is returned."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for entry in coco["images"]:
        pixels = generator.integers(0, 255, (entry["height"], entry["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / entry["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps(coco))
    return path


TREE = """
task: detection
run: small
model: {categories: 3}
data:
  resize: {kind: jitter, size: 64, scale: [0.5, 1.5]}
  test_side: 64
  test_longest: 64
  without_objects: true
  workers: 0
optimizer: {global_batch_size: 4, max_micro_batch: 1, duration: 4 steps, warmup: 1 steps,
            learning_rate: 1.0e-3, layer_decay: 0.75, average: 0.9}
checkpoint: {every: 2 steps}
engine: {precision: fp32, device: cpu}
logging: {trackers: [], pictures: false}
"""


def small_detection(
    images: Path, folder: Path, name: str, overrides: Mapping[str, Any] | None = None
) -> Detection:
    """The configuration of a run on the set in `images`, with keys `a.b` changed."""
    backbone, head = DETECTORS[name]
    where = {"annotations": f"{images}/instances.json", "images": f"{images}/images"}
    own: dict[str, Any] = {
        "folder": str(folder), "model.backbone": backbone, "model.head": head,
        "model.windows": WINDOWS, "data.train": where, "data.val": where,
    }  # fmt: skip
    return Detection.model_validate(small_tree(TREE, own | dict(overrides or {})))


def train_detector(
    world: World, folder: Path, images: str, name: str, resume: str
) -> dict[str, Any]:
    """As `train_task`."""
    return train_task(world, small_detection(Path(images), folder, name), resume)


def train_and_resume_detector(world: World, folder: Path, images: str, name: str) -> dict[str, Any]:
    """As `train_and_resume_task`."""
    return train_and_resume_task(folder, partial(train_detector, world, folder, images, name))
