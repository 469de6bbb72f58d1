"""Networks of a configuration, and the learning rates of their layers."""

from __future__ import annotations

from torch import nn

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import Mask2Former, SegmentationModel
from m3i_scale.models import layer_decay
from m3i_scale.tasks.segmentation.mask2former import Mask2FormerSegmenter
from m3i_scale.tasks.segmentation.networks import Segmenter
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
    return networks


def layer_scales(networks: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of every parameter, by its name (see `layer_decay`)."""
    return layer_decay.layer_scales(networks, decay)
