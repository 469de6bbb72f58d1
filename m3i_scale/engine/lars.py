"""LARS (arXiv 1708.03888) for parameters that ZeRO has split.

Each weight matrix moves at a rate in proportion to its norm over its gradient's:

    trust = TRUST * |w| / (|g| + weight_decay * |w| + epsilon)      1 where |w| or |g| is 0
    m    <- momentum * m + trust * (g + weight_decay * w)
    w    <- w - rate * m

Biases and norms have trust 1 and no decay, MAE's rule. Values are those of `timm.optim.Lars` with
`always_adapt`. Norms are those of whole parameters: a parameter group has one parameter, of which
this rank holds a part and padding of zeros, and squares are added over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.objective.collectives import rank_and_size

TRUST = 0.001


class Lars(torch.optim.Optimizer):
    """LARS; groups have one tensor, `adapt` (False: trust is 1) and `weight_decay`.

    A step is a collective: all ranks update the groups in one order.

    Args:
        groups: as `zero.parameter_groups` makes them for LARS.
        lr: learning rate.
        momentum: share of the old average.
        epsilon: added to the norm of the gradient.
    """

    MOMENTS = ("momentum",)  # what `Shards` finds in the state

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, epsilon: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "epsilon": epsilon}
        super().__init__(groups, defaults | {"weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update what has a gradient (a collective)."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(weight)}
        state["step"] += 1
        change = gradient.add(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            change *= _trust(weight, gradient, group["weight_decay"], group["epsilon"])
        state["momentum"].mul_(group["momentum"]).add_(change)
        weight.sub_(state["momentum"], alpha=group["lr"])


def _trust(weight: Tensor, gradient: Tensor, decay: float, epsilon: float) -> Tensor:
    """Factor of the gradient, float32 () on its device (a collective)."""
    parts = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (weight, gradient)]
    squares = torch.stack(parts).square()
    if rank_and_size()[1] > 1:
        dist.all_reduce(squares)
    own, of_gradient = squares.sqrt()
    ratio = TRUST * own / (of_gradient + decay * own + epsilon)
    return torch.where((own > 0) & (of_gradient > 0), ratio, 1.0).float()
