"""Test of a network: one confusion matrix over the whole set and all ranks, and what it says."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.cluster.launch import World
from m3i_scale.config.segmentation import IGNORED
from m3i_scale.data.bad_sample import BadSample, explain
from m3i_scale.tasks.segmentation.dataset import Sample, SegmentationSet
from m3i_scale.tasks.segmentation.inference import Plan, Planner
from m3i_scale.tasks.segmentation.networks import Inputs
from m3i_scale.tasks.segmentation.tiles import Tiles

log = logging.getLogger(__name__)

_AHEAD = 4  # images that are being read while the networks run


@dataclass(frozen=True)
class Result:
    """What a test has found; the same on every rank.

    confusion   int64 (C, C) on the CPU: pixels of a class (row) that are predicted as a class
    names       of the classes
    images      that were tested
    left_out    images that could not be
    tiles       small pictures of some images and of the worst
    """

    confusion: Tensor
    names: Sequence[str]
    images: int
    left_out: int
    tiles: Tiles

    def figures(self) -> dict[str, float]:
        """mIoU, mean accuracy, pixel accuracy (0 to 1), and how many images they are of.

        Means are over classes that are in a mask or are predicted; accuracy has those in masks.
        """
        hits = self.confusion.diagonal().double()
        return {
            "mIoU": _mean(hits / self._union),
            "mean_accuracy": _mean(hits / self._truth),
            "pixel_accuracy": float(hits.sum() / self._truth.sum()),
            "images": float(self.images),
            "left_out": float(self.left_out),
        }

    def table(self) -> dict[str, Any]:
        """The figures, and intersection over union, accuracy and pixels of each class, for JSON.

        null where there is nothing to divide by.
        """
        hits = self.confusion.diagonal().double()
        iou, accuracy = (hits / self._union).tolist(), (hits / self._truth).tolist()
        classes = {
            name: {"IoU": _number(iou[i]), "accuracy": _number(accuracy[i]), "pixels": pixels}
            for i, (name, pixels) in enumerate(
                zip(self.names, self.confusion.sum(1).tolist(), strict=True)
            )
        }
        figures = {name: _number(value) for name, value in self.figures().items()}
        return {**figures, "classes": classes}

    @property
    def _truth(self) -> Tensor:
        return self.confusion.sum(1).double()

    @property
    def _union(self) -> Tensor:
        return self._truth + self.confusion.sum(0) - self.confusion.diagonal()


@torch.no_grad()
def evaluate(
    networks: Callable[[Inputs], Mapping[str, Tensor]],
    data: SegmentationSet,
    names: Sequence[str],
    planner: Planner,
    world: World,
    tiles: int = 8,
) -> Result:
    """Test networks in evaluation mode: rank r takes images r, r + ranks, ... (a collective).

    An image that cannot be read is left out, counted and named in the log.

    Args:
        networks: give `scores` of inputs without masks; every rank calls them equally often.
        data: of which nothing is augmented.
        names: of the classes.
        planner: how images are cut.
        world: the ranks.
        tiles: how many images, and how many of the worst, are kept as small pictures.

    Raises:
        ValueError: no image could be read.
    """
    confusion = torch.zeros(data.classes**2, dtype=torch.int64, device=world.device)
    kept = Tiles.choose(len(data), tiles)
    bad: Counter[str] = Counter()
    images = 0
    for index, sample in _shared(data, world):
        plan = None
        if isinstance(sample, BadSample):
            bad[sample.cause] += 1
            log.warning("left out: %s", sample)
        elif sample is not None:
            plan = planner.plan(sample.image)
        answers = _run(networks, plan, planner, world)
        if plan is not None and isinstance(sample, Sample):
            prediction = plan.prediction(answers)
            found = count(sample.mask.to(world.device), prediction, data.classes)
            confusion += found.flatten()
            images += 1
            kept.add(index, sample, prediction.cpu(), found)
    totals = torch.tensor([images, bad.total()], device=world.device)
    if world.size > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(totals)
    if bad:
        log.warning("left out on this rank: %s", "; ".join(explain(bad)))
    if not totals[0]:
        raise ValueError(f"none of {len(data)} images could be tested: {'; '.join(explain(bad))}")
    matrix = confusion.view(data.classes, data.classes).cpu()
    return Result(matrix, names, int(totals[0]), int(totals[1]), kept.gathered(world))


def count(mask: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Confusion matrix int64 (C, C) of one mask and prediction (H, W), truth in rows."""
    labelled = mask != IGNORED
    pairs = mask[labelled].long() * classes + prediction[labelled].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _shared(data: SegmentationSet, world: World) -> Iterator[tuple[int, Sample | BadSample | None]]:
    """This rank's images, read ahead; as many on every rank, None where there are no more."""

    def read(index: int) -> Sample | BadSample | None:
        try:
            return data.read(index) if index < len(data) else None
        except BadSample as bad:
            return bad

    rounds = math.ceil(len(data) / world.size)
    indices = [world.rank + world.size * number for number in range(rounds)]
    with ThreadPoolExecutor(_AHEAD) as pool:
        coming = [pool.submit(read, index) for index in indices[:_AHEAD]]
        for number, index in enumerate(indices):
            sample = coming.pop(0).result()
            if number + _AHEAD < rounds:
                coming.append(pool.submit(read, indices[number + _AHEAD]))
            yield index, sample


def _run(
    networks: Callable[[Inputs], Mapping[str, Tensor]],
    plan: Plan | None,
    planner: Planner,
    world: World,
) -> list[Tensor]:
    """Scores of a plan's inputs; calls go on with zeros until the slowest rank has made its own."""
    inputs = [] if plan is None else list(plan.inputs())
    most = torch.tensor(len(inputs), device=world.device)
    if world.size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    answers = [networks(Inputs(images))["scores"] for images in inputs]
    for _ in range(int(most) - len(inputs)):
        networks(Inputs(planner.nothing()))
    return answers


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
