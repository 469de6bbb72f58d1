"""Small heads of the objective: projector and predictor of global features, softmax temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear -> LayerNorm -> GELU -> Linear: (..., in_width) -> (..., out_width).

    LayerNorm, where BYOL and MoCo v3 have BatchNorm: its result does not depend on how a batch is
    spread over ranks, and it keeps no running statistics.
    """

    def __init__(self, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__(
            nn.Linear(in_width, hidden),
            nn.LayerNorm(hidden, eps=1e-6),
            nn.GELU(),
            nn.Linear(hidden, out_width),
        )


class Temperature(nn.Module):
    """Multiplies scores by 1 / tau; a learnable tau is kept above 0.01, as CLIP does."""

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        value = math.log(1 / temperature)
        self.fixed = 1 / temperature
        self.log_scale = nn.Parameter(torch.full((1,), value)) if learnable else None

    def forward(self, scores: Tensor) -> Tensor:
        """Scores of any shape, divided by tau, in float32."""
        if self.log_scale is None:
            return scores.float() * self.fixed
        return scores.float() * self.log_scale.float().clamp(max=math.log(100)).exp()
