"""Does a task's wiring hold? Eight images of the pasted set, learned by heart.

    python benchmarks/memorise.py detection --head dino        # box AP 1.0
    python benchmarks/memorise.py detection --head mask_rcnn   # box and mask AP
    python benchmarks/memorise.py segmentation --head upernet  # mIoU
    python benchmarks/memorise.py segmentation --head mask2former

On a GPU where there is one (--device), or on one CPU core.
Training and evaluation see the same eight images, without augmentation; a small InternImage starts
from nothing. Segmentation sees them at twice their size, as its maps have a quarter of the rows.
What does not come close to 1 has a fault between annotation file and figure. Prints a line for each
evaluation and ends at the target, or after --steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from m3i_scale.cluster.launch import World
from m3i_scale.config.detection import DetectionData, Detector
from m3i_scale.config.segmentation import (
    SegmentationData,
    SegmentationEvaluation,
    SegmentationModel,
)
from m3i_scale.shards.pasted import Recipe, build
from m3i_scale.tasks.detection.dataset import open_test, open_training
from m3i_scale.tasks.detection.evaluation import detect, measure
from m3i_scale.tasks.detection.networks import build_detector, needs_masks
from m3i_scale.tasks.segmentation import evaluation as segmentation_evaluation
from m3i_scale.tasks.segmentation.augmentation import TrainingCrop
from m3i_scale.tasks.segmentation.build import build_networks
from m3i_scale.tasks.segmentation.dataset import SegmentationSet, read_class_names
from m3i_scale.tasks.segmentation.inference import Planner
from m3i_scale.tasks.segmentation.networks import inputs_of

SIZE, IMAGES, BATCH = 96, 8, 4
BACKBONE = {
    "name": "intern_image",
    "options": {"channels": 24, "depths": [1, 1, 3, 1], "groups": [3, 6, 12, 24]},
}
HEADS: dict[str, dict[str, Any]] = {
    "dino": {
        "kind": "dino",
        "width": 64,
        "heads": 4,
        "ffn": 128,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "queries": 30,
        "denoising": 60,
    },
    "mask_rcnn": {
        "kind": "mask_rcnn",
        "width": 32,
        "box_hidden": 128,
        "anchors": [16, 32, 64, 96, 128],
        "proposals": 100,
        "box_samples": 64,
        "proposal_samples": 64,
    },
    "upernet": {"kind": "upernet", "width": 64, "auxiliary_width": 32, "dropout": 0.0},
    "mask2former": {
        "kind": "mask2former",
        "width": 64,
        "heads": 4,
        "queries": 20,
        "encoder_layers": 2,
        "encoder_ffn": 128,
        "decoder_layers": 3,
        "decoder_ffn": 128,
        "points": 2048,
    },
}


def alone(options: argparse.Namespace) -> World:
    """One process without others, on the device that was asked for."""
    return World(0, 0, 1, torch.device(options.device))


def detection(options: argparse.Namespace, folder: Path) -> None:
    """Box AP, and mask AP where the head has masks."""
    pasted = build(folder / "pasted", Recipe(image_size=SIZE, train=IMAGES, val=1))
    where = {"annotations": str(pasted.annotations("train")), "images": str(pasted.images("train"))}
    data = DetectionData.model_validate(
        {
            "train": where,
            "val": where,
            "resize": {"kind": "jitter", "size": SIZE, "scale": [1.0, 1.0]},
            "flip_probability": 0.0,
            "test_side": SIZE,
            "test_longest": SIZE,
            "without_objects": True,
        }
    )
    tree = {"backbone": BACKBONE, "head": HEADS[options.head]}
    config = Detector.model_validate({**tree, "categories": len(Recipe().characters)})
    masks = needs_masks(config)
    images, test = open_training(data, masks=masks)[0], open_test(data, masks=masks)[0]
    world = alone(options)
    networks = build_detector(config, data).to(world.device)

    def loss(chosen: list[int]) -> torch.Tensor:
        batch = images.collate([images.load(i) for i in chosen])
        return networks(batch.to(world.device))["loss"]

    def figures() -> dict[str, float]:
        networks.eval()
        results, _ = detect(networks, test, world, batch=BATCH)
        networks.train()
        found: dict[str, float] = {}
        for kind in ("box", "mask") if masks else ("box",):
            found |= measure(test.file, results, kind)
        return {name: value for name, value in found.items() if name.endswith(("/AP", "/AP50"))}

    learn(options, networks, loss, figures, ("box/AP", *(["mask/AP"] if masks else [])))


def segmentation(options: argparse.Namespace, folder: Path) -> None:
    """mIoU and pixel accuracy; the background is a class."""
    pasted = build(folder / "pasted", Recipe(image_size=SIZE, train=IMAGES, val=1))
    where = {"images": str(pasted.images("train")), "masks": str(pasted.masks("train"))}
    large = {"short_side": 2 * SIZE, "long_side": 2 * SIZE}
    still = {"scale": [1.0, 1.0], "flip": 0.0, "photometric": 0.0}
    data = SegmentationData.model_validate(
        {"train": where, "crop": 2 * SIZE, "augmentation": {**large, **still}}
    )
    names = read_class_names(str(pasted.folder / "classes.json"), len(Recipe().characters) + 1)
    model = SegmentationModel.model_validate(
        {"backbone": BACKBONE, "head": HEADS[options.head], "classes": len(names)}
    )
    images = SegmentationSet(data.train, data, len(names), TrainingCrop(data))
    world = alone(options)
    networks = build_networks(model, data.crop).to(world.device)
    settings = SegmentationEvaluation.model_validate(large)
    planner = Planner(settings, data, networks.multiple, world.device, torch.float32)

    def loss(chosen: list[int]) -> torch.Tensor:
        batch = images.collate([images.load(i) for i in chosen])
        return networks(inputs_of(batch.to(world.device), data, torch.float32))["loss"]

    def figures() -> dict[str, float]:
        networks.eval()
        found = segmentation_evaluation.evaluate(networks, images, names, planner, world, tiles=0)
        networks.train()
        return {name: found.figures()[name] for name in ("mIoU", "pixel_accuracy")}

    learn(options, networks, loss, figures, ("mIoU",))


TASKS = {
    "detection": (detection, ("dino", "mask_rcnn")),
    "segmentation": (segmentation, ("upernet", "mask2former")),
}


def learn(
    options: argparse.Namespace,
    networks: torch.nn.Module,
    loss: Callable[[list[int]], torch.Tensor],
    figures: Callable[[], dict[str, float]],
    watched: Sequence[str],
) -> None:
    """Train until all watched figures reach the target; print figures as they come."""
    parameters = sum(p.numel() for p in networks.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {IMAGES} images of {SIZE} pixels", flush=True)
    optimizer = torch.optim.AdamW(networks.parameters(), options.rate, weight_decay=1e-4)
    networks.train()
    started = time.process_time()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            late = 1.0 if step < 0.7 * options.steps else 0.2
            group["lr"] = options.rate * min(1.0, step / 30) * late
        total = loss(torch.randperm(IMAGES)[:BATCH].tolist())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        if step % options.every == 0 or step == options.steps:
            found = figures()
            words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            spent = time.process_time() - started
            print(f"step {step}, {spent:.0f} s, loss {total.item():.2f}: {words}", flush=True)
            if min(found[name] for name in watched) >= options.target:
                return


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--head", choices=list(HEADS), help="default: the first of the task")
    parser.add_argument("--steps", type=int, default=1000, help="most (%(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(%(default)s)")
    parser.add_argument("--target", type=float, default=0.999, help="ends the run (%(default)s)")
    options = parser.parse_args()
    run, heads = TASKS[options.task]
    options.head = options.head or heads[0]
    if options.head not in heads:
        parser.error(f"{options.task} has the heads {' and '.join(heads)}, not {options.head}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
