"""Detectors by configuration, and the learning rates of their layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from m3i_scale.config import Model
from m3i_scale.config.detection import DetectionData, Detector, Dino
from m3i_scale.integrations.initial import open_initial
from m3i_scale.tasks.detection.backbones import layer_scales, pretrained_names
from m3i_scale.tasks.detection.dino import DinoDetector
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector

__all__ = [
    "build_detector",
    "layer_scales",
    "load_pretrained",
    "needs_masks",
    "pretrained_names",
]


def build_detector(
    config: Detector,
    data: DetectionData,
    categories: int,
    image_counts: Sequence[int] | None = None,
) -> MaskRcnnDetector | DinoDetector:
    """The networks of a detector for so many categories; weights from the default generator.

    `image_counts`, the images with each category, serve DINO's federated loss.

    Raises:
        ValueError: the backbone is unknown, or an option does not fit.
    """
    if isinstance(config.head, Dino):
        return DinoDetector(config, data, categories, image_counts)
    return MaskRcnnDetector(config, data, categories)


def needs_masks(config: Detector) -> bool:
    """Whether objects must have masks."""
    return not isinstance(config.head, Dino) and config.head.masks


@torch.no_grad()
def load_pretrained(networks: nn.Module, config: Detector) -> list[str]:
    """Give the backbone the weights that `config.init` names; a report of what came and what not.

    The networks are whole, on any device. Both backbones of a composite get the same weights.

    Raises:
        ConfigError: the weights do not exist, cannot be read, or do not fit the backbone.
    """
    initial = open_initial(Model(backbone=config.backbone, init=config.init))
    known, own = set(initial.names), dict(networks.named_parameters())
    new = []
    for name, theirs in pretrained_names(networks).items():
        if theirs in known:
            own[name].copy_(initial.tensor(theirs))
        else:
            new.append(name)
    return [*initial.lines(), *([f"not in the weights: {', '.join(new)}"] if new else [])]
