"""Detectors and one pass of them on fake tensors, at fixed sizes, for `m3i plan`.

Images have the largest size of training. What contents decide has a size that it seldom exceeds:

- Mask R-CNN's heads see `box_samples` regions of each image, and masks a quarter of them, which is
  the most that is sampled. Left out: the choice of proposals and of anchors, their losses, and
  regions while they are cut, in float32, all of which need memory for a moment; and the objects'
  masks, 5 bytes for each pixel of each object (0.1 GB for 20 objects at 1024 pixels).
- DINO's decoder sees all queries and twice `denoising` noised objects: fewer where the objects of
  an image do not divide `denoising`, more where there are more objects than that. Left out: the
  matching of queries with objects, which is without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.config.detection import (
    Detection,
    DetectionData,
    Detector,
    Dino,
    Jitter,
    MaskRcnn,
)
from m3i_scale.profiling.record import ROWS, Sketch
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.detection.batch import DIVISOR, Batch
from m3i_scale.tasks.detection.dino import DinoDetector
from m3i_scale.tasks.detection.dino_loss import DinoLoss, Predicted, Target
from m3i_scale.tasks.detection.mask_rcnn import (
    BOX_SIDE,
    MASK_SIDE,
    POSITIVE,
    MaskRcnnDetector,
)
from m3i_scale.tasks.detection.networks import build_detector
from m3i_scale.tasks.transfer import empty_images

OBJECTS = 10  # of an image; one of COCO has 7 on average
_PARTS = ("encoder", "decoder")  # of DINO, with `layers` that may be checkpointed


def largest_size(config: Detection) -> tuple[int, int]:
    """Height and width of the largest training image."""
    resize = config.data.resize
    if isinstance(resize, Jitter):
        return resize.size, resize.size
    return min(max(resize.shorter), resize.longest), resize.longest


def padded_size(config: Detection) -> tuple[int, int]:
    """The same as networks see it."""
    height, width = (-(-side // DIVISOR) * DIVISOR for side in largest_size(config))
    return height, width


def title(config: Detection) -> str:
    """Head, backbone and size."""
    head, (height, width) = config.model.head, largest_size(config)
    times = "2 x " if isinstance(head, Dino) and head.composite else ""
    return f"{head.kind} on {times}{config.model.backbone.name}, {height} x {width} pixels"


def notes(config: Detection) -> list[str]:
    """What the pass stands for."""
    head, (height, width) = config.model.head, largest_size(config)
    size = (
        f"images of {height} x {width} pixels, the largest: a step waits for the rank that has one"
    )
    if isinstance(head, Dino):
        seen = f"{head.queries:,} queries and {2 * head.denoising:,} noised objects of an image"
        return [size, f"{seen}; no matching"]
    seen = f"{head.box_samples} regions of an image"
    masks = f", {_positive(head.box_samples)} with masks" if head.masks else ""
    return [size, f"{seen}{masks}; no choice of proposals"]


def with_layers(found: Sketch, head: Dino) -> Sketch:
    """DINO's sketch, whose encoder and decoder may be checkpointed, too."""

    def blocks(networks: Any) -> list[tuple[str, nn.Module]]:
        layers = [
            (f"{part}.layers.{number}", layer)
            for part in _PARTS
            for number, layer in enumerate(getattr(networks, part).layers)
        ]
        return [*found.blocks(networks), *layers]

    own = tuple(f"{part}.layers." for part in _PARTS) if head.checkpoint_layers else ()
    return replace(
        found,
        blocks=blocks,
        recomputed=(*found.recomputed, *own),
        checkpointing=f"{found.checkpointing} model.head.checkpoint_layers=true",
    )


def build(config: Detection) -> nn.Module:
    """The networks without checkpointing.

    Raises:
        ValueError: as `build_detector`.
    """
    model = config.model
    changes: dict[str, Any] = {"backbone": without_checkpointing(model.backbone)}
    if isinstance(model.head, Dino):
        changes["head"] = model.head.model_copy(update={"checkpoint_layers": False})
        return _FixedDino(model.model_copy(update=changes), config.data, [1] * model.categories)
    return build_detector(model.model_copy(update=changes), config.data)


def run(config: Detection, networks: nn.Module) -> object:
    """The losses of `ROWS` images; of Mask R-CNN what its networks predict."""
    if isinstance(networks, MaskRcnnDetector):
        return _regions(config, networks)
    assert isinstance(networks, DinoDetector)
    for layer in networks.encoder.layers:
        layer.training = False  # in training it looks for infinite values; nothing is dropped
    height, width = padded_size(config)
    batch = Batch(
        images=torch.empty(ROWS, 3, height, width, dtype=torch.uint8),
        sizes=torch.empty(ROWS, 2, dtype=torch.int64),
        objects=(),
        image_ids=(),
        originals=(),
        key=(),
        keys=torch.empty(ROWS, dtype=torch.int64),
    )
    targets = [Target(torch.zeros(OBJECTS).long(), torch.empty(OBJECTS, 4)) for _ in range(ROWS)]
    federated = networks.head.federated is not None
    return networks.losses(
        batch, targets, torch.empty(config.model.categories) if federated else None
    )


def _regions(config: Detection, networks: MaskRcnnDetector) -> object:
    """Backbone, pyramid, proposals, and the heads' predictions of their regions."""
    head, heads = config.model.head, networks.roi_heads
    assert isinstance(head, MaskRcnn)
    keys = torch.empty(ROWS, dtype=torch.int64)
    _, maps = networks.maps(empty_images(config, *padded_size(config)), keys)
    found = [networks.rpn.head(list(maps.values()))]

    def cut(count: int, side: int) -> Tensor:
        return maps["0"].new_empty(ROWS * count, head.width, side, side)

    found.append(heads.box_predictor(heads.box_head(cut(head.box_samples, BOX_SIDE))))
    if head.masks:
        seen = cut(_positive(head.box_samples), MASK_SIDE)
        found.append(heads.mask_predictor(heads.mask_head(seen)))
    return found


def _positive(samples: int) -> int:
    """Regions with an object, at most."""
    return int(samples * POSITIVE)


class _FixedLoss(DinoLoss):
    """Matches the first queries, and measures boxes without looking at their contents."""

    def match(self, predicted: Predicted, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.arange(len(t.labels)), torch.arange(len(t.labels))) for t in targets]

    def apart(self, found: Tensor, wanted: Tensor) -> Tensor:
        return F.l1_loss(found, wanted, reduction="sum")


class _FixedDino(DinoDetector):
    """Has the same number of noised objects for any objects, and looks at no content."""

    def __init__(self, config: Detector, data: DetectionData, counts: Sequence[int]) -> None:
        super().__init__(config, data, counts)
        self.loss = _FixedLoss(self.head, torch.tensor(counts))

    def _denoising(
        self, targets: Sequence[Target], queries: int
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        assert self.noised is not None
        noised, rows = 2 * self.head.denoising, len(targets)
        content = self.noised(torch.zeros(rows, noised).long())
        attention = torch.empty(noised + queries, noised + queries)
        pair = (torch.arange(noised // 2), torch.arange(noised // 2) % OBJECTS)
        return content, torch.empty(rows, noised, 4), attention, [pair] * rows
