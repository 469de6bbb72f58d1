"""Scores of one image: whole or through a sliding window, at several sizes, mirrored or not.

`plan` cuts an image into what the networks see at once, and `Plan.prediction` puts their answers
together; between both the caller runs the networks, which at ZeRO stage 3 all ranks must do equally
often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import SegmentationData, SegmentationEvaluation
from m3i_scale.tasks.pixels import normalised_pixels
from m3i_scale.tasks.segmentation.augmentation import fitted
from m3i_scale.tasks.segmentation.networks import resize

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """An image resized and perhaps mirrored, and the windows it is seen through.

    image   float (3, h, w), normalised
    """

    image: Tensor
    flipped: bool
    boxes: Sequence[Box]


@dataclass(frozen=True)
class Plan:
    """What the networks have to see of one image of `size` rows and columns."""

    size: tuple[int, int]
    views: Sequence[View]
    multiple: int
    batch: int

    def inputs(self) -> Iterator[Tensor]:
        """Images (n, 3, H, W) of at most `batch` windows, H and W multiples of `multiple`."""
        for view in self.views:
            for boxes in _groups(view.boxes, self.batch):
                parts = torch.stack([_cut(view.image, box) for box in boxes])
                below, beside = (-side % self.multiple for side in parts.shape[-2:])
                yield F.pad(parts, (0, beside, 0, below))  # zero is the mean

    def prediction(self, answers: Sequence[Tensor]) -> Tensor:
        """The class of each pixel, uint8, of the scores (n, C, H, W) of all `inputs` in order."""
        left = iter(answers)
        total: Tensor | None = None
        for view in self.views:
            scores = [next(left) for _ in _groups(view.boxes, self.batch)]
            found = self._of_view(view, torch.cat(scores))
            total = found if total is None else total + found
        assert total is not None
        return total.argmax(0).to(torch.uint8)

    def _of_view(self, view: View, scores: Tensor) -> Tensor:
        height, width = view.image.shape[-2:]
        merged = scores.new_zeros(scores.shape[1], height, width)
        seen = scores.new_zeros(height, width)
        for found, (top, left, rows, columns) in zip(scores, view.boxes, strict=True):
            merged[:, top : top + rows, left : left + columns] += found[:, :rows, :columns]
            seen[top : top + rows, left : left + columns] += 1
        merged = resize((merged / seen)[None], self.size)[0]
        merged = merged.flip(-1) if view.flipped else merged
        # Views of different sizes have scores of different scale.
        return merged.softmax(0) if len(self.views) > 1 else merged


class Planner:
    """Plans images as `test` says, on a device and in the precision of the networks.

    Raises:
        ConfigError: windows would not cover an image.
    """

    def __init__(
        self,
        test: SegmentationEvaluation,
        data: SegmentationData,
        multiple: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if test.mode == "window" and test.stride > data.crop:
            raise ConfigError(
                f"evaluation.stride {test.stride} is above data.crop {data.crop}, so that windows "
                "would leave gaps between them; make it smaller"
            )
        self.test, self.crop, self.multiple = test, data.crop, multiple
        self._device, self._dtype = device, dtype
        self._data = data

    def plan(self, image: Tensor) -> Plan:
        """Cut an image, uint8 (3, H, W)."""
        height, width = image.shape[-2:]
        views = []
        for factor in self.test.scales:
            size = fitted(
                (height, width),
                self.test.short_side * factor,
                self.test.long_side * factor,
                self.test.round_to,
            )
            resized = transforms.resize(image, list(size), antialias=True)
            ready = normalised_pixels(resized, self._data.mean, self._data.std)
            ready = ready.to(self._device, self._dtype)
            boxes = (
                windows(size, self.crop, self.test.stride) if self._windowed else [(0, 0, *size)]
            )
            views += [
                View(ready.flip(-1) if flipped else ready, flipped, boxes)
                for flipped in (False, True)[: 1 + self.test.flip]
            ]
        return Plan((height, width), views, self.multiple, self.test.batch)

    def nothing(self) -> Tensor:
        """A small image that any of the networks takes."""
        side = 2 * self.multiple
        return torch.zeros(1, 3, side, side, device=self._device, dtype=self._dtype)

    @property
    def _windowed(self) -> bool:
        return self.test.mode == "window"


def windows(size: tuple[int, int], side: int, stride: int) -> list[Box]:
    """Windows of at most `side` pixels that cover an image, the last ones against its edges."""

    def starts(length: int) -> list[int]:
        last = max(length - side, 0)
        return [*range(0, last, stride), last]

    height, width = (min(side, length) for length in size)
    return [(top, left, height, width) for top in starts(size[0]) for left in starts(size[1])]


def _groups(boxes: Sequence[Box], most: int) -> Iterator[Sequence[Box]]:
    for start in range(0, len(boxes), most):
        yield boxes[start : start + most]


def _cut(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]
