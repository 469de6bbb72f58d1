"""Networks of a configuration, and what a forward pass of them costs."""

from __future__ import annotations

import torch

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import Mask2Former, SegmentationModel
from m3i_scale.profiling.forward import forward_flops
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.segmentation.mask2former import Mask2FormerSegmenter
from m3i_scale.tasks.segmentation.networks import Inputs, Segmenter
from m3i_scale.tasks.segmentation.upernet import UperNetSegmenter


def build_networks(model: SegmentationModel, crop: int) -> Segmenter:
    """Build the networks for training images of `crop` pixels.

    Raises:
        ConfigError: the backbone's maps do not fit the crop, or a package is missing.
        ValueError: the backbone cannot be built.
    """
    head = Mask2FormerSegmenter if isinstance(model.head, Mask2Former) else UperNetSegmenter
    networks: Segmenter = head(model)
    if crop % networks.multiple:
        raise ConfigError(
            f"data.crop {crop} is not a multiple of {networks.multiple}, as the four maps of this "
            "backbone need it"
        )
    if isinstance(model.head, Mask2Former) and crop < 2 * networks.multiple:
        raise ConfigError(
            f"data.crop {crop} leaves Mask2Former one pixel in its coarsest map, which it cannot "
            f"normalise; make it {2 * networks.multiple} or more"
        )
    return networks


def segmenter_flops(model: SegmentationModel, crop: int) -> float:
    """FLOPs of one forward pass over an image of crop x crop pixels.

    Raises:
        ValueError: as `build_networks`.
    """
    model = model.model_copy(update={"backbone": without_checkpointing(model.backbone)})
    return forward_flops(
        lambda: build_networks(model, crop),
        lambda networks: networks(Inputs(torch.zeros(1, 3, crop, crop))),
    )
