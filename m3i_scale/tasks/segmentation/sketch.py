"""Segmentation networks and one pass of them on fake tensors, for `m3i plan`.

UperNet's pass is the whole of it. Mask2Former's losses are those of masks that are matched, of
which an image has as many as classes: `MASKS` stand for it. Another mask costs its pixels in
float32 and, in every layer, the prediction that is matched with it and some numbers for each of
`points`: for ADE20k at 896 pixels about 10 MB, a thousandth of what is kept. The matching itself
runs without gradient and is left out; it needs less memory than the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from m3i_scale.config.segmentation import Segmentation
from m3i_scale.profiling.record import ROWS
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.segmentation.build import build_networks
from m3i_scale.tasks.segmentation.mask2former import Mask2FormerSegmenter
from m3i_scale.tasks.segmentation.networks import Inputs, Segmenter
from m3i_scale.tasks.transfer import empty_images

MASKS = 10  # of an image; one of ADE20k has 9 classes on average


def masks_of(config: Segmentation) -> int:
    """Masks of an image in the pass."""
    return min(MASKS, config.model.classes)


class _FirstQueries(nn.Module):
    """Matches the first queries, whatever they predict."""

    def forward(self, masks: Any, classes: Any, mask_labels: Any, labels: Any) -> Any:
        numbers = [torch.arange(min(len(own), classes.shape[1])) for own in labels]
        return [(number, number) for number in numbers]


def build(config: Segmentation) -> Segmenter:
    """The networks without checkpointing.

    Raises:
        ConfigError, ValueError: as `build_networks`.
    """
    backbone = without_checkpointing(config.model.backbone)
    networks = build_networks(
        config.model.model_copy(update={"backbone": backbone}), config.data.crop
    )
    if isinstance(networks, Mask2FormerSegmenter):
        networks.criterion.matcher = _FirstQueries()
    return networks


def run(config: Segmentation, networks: Segmenter) -> object:
    """The losses of `ROWS` images."""
    crop = config.data.crop
    keys, masks = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS, crop, crop).byte()
    inputs = Inputs(empty_images(config, crop, crop), masks, keys)
    if not isinstance(networks, Mask2FormerSegmenter):
        return networks.forward(inputs)
    for layer in networks.pixel_decoder.encoder.layers:
        layer.training = False  # in training it looks for infinite values; nothing is dropped
    count = masks_of(config)
    labels = [(torch.empty(count, crop, crop), torch.zeros(count).long()) for _ in masks]
    return networks.losses_of(networks.maps(inputs), labels)
