"""FLOPs of a backbone by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m3i_scale.config import Backbone
from m3i_scale.models.backbone import build_backbone
from m3i_scale.profiling.trace import count_flops, reference_operators


def backbone_flops(spec: Backbone, size: int) -> float:
    """FLOPs of one forward pass over an image of size x size pixels, by the rules of `flops`.

    Raises:
        ValueError: the backbone cannot be built, or the size does not fit it.
    """
    options = {k: v for k, v in spec.options.items() if k != "checkpoint_blocks"}
    with torch.random.fork_rng(devices=[]), reference_operators():
        with torch.device("meta"):
            backbone = build_backbone(spec.name, **options)
        assert isinstance(backbone, nn.Module)
        with FakeTensorMode(allow_non_fake_inputs=True):
            backbone.to_empty(device="cpu").eval()
            images = torch.zeros(1, 3, size, size)
            return float(count_flops(lambda: backbone.features(images)))
