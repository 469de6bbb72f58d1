"""The objective's small heads: projector and predictor of global features, temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from m3i_scale.models.layers import XavierLinear, layer_norm
from m3i_scale.models.precision import at_least_float32


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
    """What turns scores into logits: the factor 1 / tau and, of a sigmoid, the bias.

    A softmax's learnable tau is kept above 0.01, as CLIP does; a sigmoid's is free, as SigLIP's
    (arXiv 2303.15343), which learns less. Not in the forward pass, where the bound would take the
    gradient away that leads back from it: who trains clamps `log_scale` to `max_log_scale` after
    each step (`M3I.upper_bounds`).

    Args:
        temperature: tau, or its start.
        learnable: whether tau is trained, and the bias.
        bias: of a sigmoid, or its start; None for a softmax.
    """

    def __init__(self, temperature: float, learnable: bool, bias: float | None = None) -> None:
        super().__init__()
        self.max_log_scale = math.log(100) if bias is None else None
        self.fixed = [1 / temperature] + ([] if bias is None else [bias])
        self.log_scale = self.bias = None
        if learnable:
            self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
            if bias is not None:
                self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, like: Tensor) -> Tensor:
        """Float32 (1,) or, of a sigmoid, (2,): 1 / tau, bias; on the device of `like`."""
        if self.log_scale is None:
            # Filled on the device: a tensor made of numbers would be copied, and waited for.
            parts = [like.new_full((1,), value, dtype=torch.float32) for value in self.fixed]
        else:
            parts = [at_least_float32(self.log_scale).exp()]
            parts += [] if self.bias is None else [at_least_float32(self.bias)]
        return torch.cat(parts) if parts[1:] else parts[0]
