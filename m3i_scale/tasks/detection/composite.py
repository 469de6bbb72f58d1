"""Two InternImages in a row, after CBNetV2 (arXiv 2107.00420): the paper's backbone for detection.

Each stage of the second starts from its own input plus a sum of the first one's maps at that stage
and all coarser ones.  The sum is weighted by a factor per channel that starts at zero: then both
give equal maps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.models.intern_image import InternImage


class Mixing(nn.Module):
    """x + gamma * sum of 1x1 convolutions of maps, resized to x; all are (B, H, W, C)."""

    def __init__(self, channels: int, of_maps: list[int]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(wide, channels, 1) for wide in of_maps)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Apply to x and the maps, the finest first."""
        total = x.new_zeros(())
        for convolution, found in zip(self.convolutions, maps, strict=True):
            total = total + F.interpolate(convolution(found.permute(0, 3, 1, 2)), x.shape[1:3])
        return x + self.gamma * total.permute(0, 2, 3, 1)


class CompositeInternImage(InternImage):
    """An InternImage, the first of the two, with the stages of the second in `second`.

    Names and initial weights of the first are those of the class; the second starts as its copy
    (`copy_first`), also after weights were loaded.
    """

    def __init__(self, *, channels: int, **options: Any) -> None:
        super().__init__(channels=channels, **options)
        self.second = copy.deepcopy(self.levels)
        widths = [channels * 2**stage for stage in range(len(self.levels))]
        self.mixing = nn.ModuleList(
            Mixing(width, widths[stage:]) for stage, width in enumerate(widths)
        )

    @torch.no_grad()
    def copy_first(self) -> None:
        """Give the second the weights of the first."""
        self.second.load_state_dict(self.levels.state_dict())

    def forward_pair(
        self, images: Tensor, keys: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The four maps (B, H, W, C) of both; stochastic depth drops the same blocks in both."""
        drawn = self.draw(images, keys)
        stem: Tensor = self.patch_embed(images)
        first: list[Tensor] = []
        second: list[Tensor] = []
        x: Tensor | None = stem
        for level, own in zip(self.levels, drawn, strict=True):
            found, x = level(x, own)
            first.append(found)
        x = stem
        for stage, (level, own) in enumerate(zip(self.second, drawn, strict=True)):
            found, x = level(self.mixing[stage](x, first[stage:]), own)
            second.append(found)
        return first, second

    def forward_stages(self, images: Tensor, keys: Tensor | None = None) -> list[Tensor]:
        """The four maps of the second."""
        return self.forward_pair(images, keys)[1]
