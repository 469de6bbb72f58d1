"""A frozen network that says what images look like to it: tokens on any grid, and a pooled vector.

It may have been trained with other normalisation, other image sizes and other strides than those
around it; whoever asks for its tokens names the grid, and gets its own interpolated.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.models.positions import Grid


class Seen(NamedTuple):
    """What a network makes of images."""

    map: Tensor  # (B, D, h, w)
    pooled: Tensor | None  # (B, E)


class Network(Protocol):
    """A plain module that sees images (B, 3, H, W) which are normalised as it was trained."""

    def __call__(self, images: Tensor) -> Seen:
        """Features and pooled vector."""
        ...


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class FrozenEncoder(nn.Module):
    """A network in evaluation mode, without gradient, behind the preparation that it expects.

    Args:
        network: a module that is a `Network`.
        given: normalisation of the images that will come.
        own: normalisation of those that the network was trained on.
        image_size: side that images are resized to, in pixels; None: as they come.
        width: D, of the tokens.
        pooled_width: E, of the pooled vector; None where the network has none.
    """

    def __init__(
        self,
        network: nn.Module,
        given: Normalisation,
        own: Normalisation,
        *,
        image_size: int | None,
        width: int,
        pooled_width: int | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.image_size, self.width, self.pooled_width = image_size, width, pooled_width
        pairs = list(zip(*given, *own, strict=True))
        self._factors = [std / own_std for _, std, _, own_std in pairs]
        self._offsets = [(mean - own_mean) / own_std for mean, _, own_mean, own_std in pairs]
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> tokens (B, N, D) on a grid of N patches, and pooled (B, E)."""
        seen = self.network(self._prepare(images))
        tokens = on_grid(seen.map, grid).flatten(2).transpose(1, 2)
        return tokens.contiguous(), seen.pooled

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalise and resize, in float32."""
        prepared = images.float()
        if self.image_size not in (None, images.shape[-1]):
            size = [self.image_size, self.image_size]
            prepared = F.interpolate(
                prepared, size, mode="bicubic", align_corners=False, antialias=True
            )
        if (self._factors, self._offsets) != ([1.0] * 3, [0.0] * 3):
            channels = [
                channel * factor + offset
                for channel, factor, offset in zip(
                    prepared.unbind(1), self._factors, self._offsets, strict=True
                )
            ]
            prepared = torch.stack(channels, 1)
        return prepared.to(images.dtype)


def on_grid(features: Tensor, grid: Grid) -> Tensor:
    """A map (B, D, h, w) on another grid of the same image: (B, D, rows, columns).

    Bilinear between the centres of patches, and where the grid is coarser the mean of what its
    patches cover.
    """
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    resized = F.interpolate(
        features.float(), list(grid), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.to(features.dtype)
