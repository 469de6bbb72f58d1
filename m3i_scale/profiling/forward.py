"""FLOPs of one forward pass of any networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m3i_scale.config import Backbone
from m3i_scale.models.backbone import build_backbone
from m3i_scale.profiling.counter import count_flops, reference_operators
from m3i_scale.profiling.trace import without_checkpointing

N = TypeVar("N", bound=nn.Module)


def forward_flops(build: Callable[[], N], run: Callable[[N], Any]) -> float:
    """FLOPs of `run(build())` by the rules of `flops`, without memory for weights or images.

    Raises:
        whatever `build` and `run` raise.
    """
    with torch.random.fork_rng(devices=[]), reference_operators():
        with torch.device("meta"):
            networks = build()
        with FakeTensorMode(allow_non_fake_inputs=True):
            networks.to_empty(device="cpu").eval()
            return float(count_flops(lambda: run(networks)))


def backbone_flops(spec: Backbone, size: int) -> float:
    """FLOPs of one forward pass over an image of size x size pixels.

    Raises:
        ValueError: the backbone cannot be built, or the size does not fit it.
    """
    spec = without_checkpointing(spec)

    def build() -> Any:
        return build_backbone(spec.name, **spec.options)

    return forward_flops(build, lambda backbone: backbone.features(torch.zeros(1, 3, size, size)))
