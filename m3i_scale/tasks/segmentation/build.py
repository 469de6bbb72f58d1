"""Networks of a configuration, and what a forward pass of them costs."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import Mask2Former, SegmentationModel
from m3i_scale.profiling.trace import count_flops, reference_operators
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


def forward_flops(model: SegmentationModel, crop: int) -> float:
    """FLOPs of one forward pass over an image of crop x crop pixels.

    Raises:
        ValueError: as `build_networks`.
    """
    options = {k: v for k, v in model.backbone.options.items() if k != "checkpoint_blocks"}
    backbone = model.backbone.model_copy(update={"options": options})
    with torch.random.fork_rng(devices=[]), reference_operators():
        with torch.device("meta"):
            networks = build_networks(model.model_copy(update={"backbone": backbone}), crop)
        with FakeTensorMode(allow_non_fake_inputs=True):
            networks.to_empty(device="cpu").eval()
            images = torch.zeros(1, 3, crop, crop)
            return float(count_flops(lambda: networks(Inputs(images))))
