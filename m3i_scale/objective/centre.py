"""Centred targets: what all patches of all images share is taken out of what has to be predicted.

Most of an untrained encoder's normalised features is one constant vector. To predict it, every
token needs the same; the gradient that says so is the same for every token and drives all features
in one direction before anything else is learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.objective.collectives import average


def moments(vectors: Tensor) -> Tensor:
    """Mean of each channel and, last, the mean square: (B, ..., D) -> float32 (D + 1,).

    Over all vectors of all ranks (a collective; all ranks have equally many), without gradient.
    """
    return average(local_moments(vectors))


@torch.no_grad()
def local_moments(vectors: Tensor) -> Tensor:
    """The same over the vectors of this rank."""
    rows = vectors.detach().float().flatten(0, -2)
    return torch.cat([rows.mean(0), rows.square().mean()[None]])


def centre(vectors: Tensor, moments: Tensor) -> Tensor:
    """Take the mean out of vectors (B, ..., D) and bring their root mean square to 1.

    The scale is one number for all vectors, so that those near the mean stay short. Without
    gradient to the moments (D + 1,).
    """
    mean, square = moments[:-1], moments[-1]
    power = (square - mean.square().mean()).clamp(min=0)
    return (vectors - mean) * torch.rsqrt(power + 1e-6)


class RunningCentre(nn.Module):
    """Moving averages of `moments` over micro-batches of all ranks; equal on all ranks, float32.

    A buffer, and so a part of every checkpoint. In training mode the average takes in the batch
    before it is used; in evaluation it stays, and a batch is its own centre before any training.
    """

    averages: Tensor  # (D + 2,): weighted sum of moments, and the sum of the weights

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        # `.float()`: contexts that build networks in half precision change what `zeros` gives.
        self.register_buffer("averages", torch.zeros(width + 2).float())

    def forward(self, vectors: Tensor) -> Tensor:
        """Centre float32 vectors (B, ..., D)."""
        return centre(vectors, self.known(moments(vectors)))

    @torch.no_grad()
    def known(self, batch: Tensor) -> Tensor:
        """Moments (D + 1,) to centre a batch by, when its own are `batch` (D + 1,)."""
        if self.training:
            new = torch.cat([batch, torch.ones_like(batch[:1])])
            moved = self.decay * self.averages + (1 - self.decay) * new
            # A batch that is not finite would spoil every later target.
            self.averages = torch.where(torch.isfinite(batch).all(), moved, self.averages)
        weight = self.averages[-1]
        known = self.averages[:-1] / weight.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(weight > 0, known, batch)

    def _apply(self, function: Any, recurse: bool = True) -> RunningCentre:
        """Move as any module does, but stay in float32: small changes would round to nothing."""
        before = self.averages
        super()._apply(function, recurse)
        if self.averages.dtype != before.dtype:
            self.averages = before.to(self.averages.device)
        return self
