"""The objective's small heads: projector and predictor of global features, softmax temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from m3i_scale.models.layers import XavierLinear, layer_norm


class MLP(nn.Sequential):
    """Linear -> LayerNorm -> GELU -> Linear: (..., in_width) -> (..., out_width).

    LayerNorm, where BYOL and MoCo v3 have BatchNorm: its result does not depend on how a batch is
    spread over ranks, and it keeps no running statistics.
    """

    def __init__(self, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__(
            XavierLinear(in_width, hidden),
            layer_norm(hidden),
            nn.GELU(),
            XavierLinear(hidden, out_width),
        )


class Temperature(nn.Module):
    """Multiplies scores by 1 / tau; a learnable tau is kept above 0.01, as CLIP does.

    Not in the forward pass, where the bound would take the gradient away that leads back from it:
    who trains clamps `log_scale` to `max_log_scale` after each step (`M3I.upper_bounds`).
    """

    max_log_scale = math.log(100)

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        value = torch.full((1,), math.log(1 / temperature))
        self.fixed = 1 / temperature
        self.log_scale = nn.Parameter(value) if learnable else None

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of any shape divided by tau, in float32; and tau itself, a scalar."""
        if self.log_scale is None:
            # Filled on the device: a tensor made of a number would be copied, and waited for.
            scale = scores.new_full((), self.fixed, dtype=torch.float32)
        else:
            scale = self.log_scale.float().exp()[0]
        return scores.float() * scale, 1 / scale.detach()
