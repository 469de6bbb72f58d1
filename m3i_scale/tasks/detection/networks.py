"""Detectors by configuration, and the learning rates of their layers."""

from __future__ import annotations

from collections.abc import Sequence

from m3i_scale.config.detection import DetectionData, Detector, Dino
from m3i_scale.tasks.detection.backbones import layer_scales, pretrained_names
from m3i_scale.tasks.detection.dino import DinoDetector
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector

__all__ = [
    "build_detector",
    "layer_scales",
    "needs_masks",
    "pretrained_names",
]


def build_detector(
    config: Detector, data: DetectionData, image_counts: Sequence[int] | None = None
) -> MaskRcnnDetector | DinoDetector:
    """The networks of a detector ; weights from the default generator.

    `image_counts`, the images with each category, serve DINO's federated loss.

    Raises:
        ValueError: the backbone is unknown, or an option does not fit.
    """
    if isinstance(config.head, Dino):
        return DinoDetector(config, data, image_counts)
    return MaskRcnnDetector(config, data)


def needs_masks(config: Detector) -> bool:
    """Whether objects must have masks."""
    return not isinstance(config.head, Dino) and config.head.masks
