"""Dynamic balance of the two losses: L = L_SSP + lambda L_SP, lambda = gamma g_ssp / g_sp.

`g` is a moving average of the norm of the gradient that an unweighted loss sends to the input
features z_x. Hooks measure both norms inside the one backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3i_scale.config import Balance


class GradientProbe:
    """Measures the gradient of each loss at the features, in one backward pass.

    `split` gives two views of the features, one for each loss; hooks on them record squared norms.
    `watch_total` records the factor by which the trainer has multiplied the loss (loss scale,
    accumulation), so that the figures are those of the loss itself.
    """

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._factor: Tensor | None = None

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of `features`: for the self-supervised and for the supervised loss."""
        self._squares, self._factor = {}, None
        views = features.view_as(features), features.view_as(features)
        for name, view in zip(("ssp", "sp"), views, strict=True):
            if view.requires_grad:
                view.register_hook(self._recorder(name))
        return views

    def watch_total(self, loss: Tensor) -> None:
        """Record the factor that multiplies `loss` in the backward pass."""

        def record(gradient: Tensor) -> None:
            self._factor = gradient.detach().float()

        if loss.requires_grad:
            loss.register_hook(record)

    def squares(self, supervised_weight: float) -> Tensor:
        """Squared gradient norms (ssp, sp) of the two unweighted losses of this rank: float32 (2,).

        To be called after the backward pass; `supervised_weight` is the lambda it ran with. A side
        without any loss has norm 0.
        """
        if self._factor is None:
            raise RuntimeError("no backward pass has run since the last forward pass")
        zero = torch.zeros((), device=self._factor.device)
        ssp = self._squares.get("ssp", zero)
        sp = self._squares.get("sp", zero) / supervised_weight**2
        return torch.stack([ssp, sp]) / self._factor.square()

    def _recorder(self, name: str):  # type: ignore[no-untyped-def]
        def record(gradient: Tensor) -> None:
            self._squares[name] = gradient.detach().float().square().sum()

        return record


# Ten times the largest gamma of the paper's Table 13: where lambda is above it, the gradient of the
# supervised loss has all but vanished beside that of the self-supervised one.
UNUSUAL = 50.0


@dataclass
class LossBalance:
    """lambda and the two moving averages it comes from.

    lambda is 1 until both were measured, and always without settings (the weights of the groups are
    used as they are), and never above `settings.maximum`.
    """

    settings: Balance | None
    g_ssp: float | None = None
    g_sp: float | None = None

    @property
    def supervised_weight(self) -> float:
        """lambda = gamma g_ssp / g_sp."""
        if not (self.settings and self.g_ssp and self.g_sp):
            return 1.0
        weight, most = self.settings.gamma * self.g_ssp / self.g_sp, self.settings.maximum
        return weight if most is None else min(weight, most)

    def update(self, g_ssp: float, g_sp: float) -> None:
        """Take in the norms of one step; a side that is zero or not finite leaves its average."""
        self.g_ssp = self._average(self.g_ssp, g_ssp)
        self.g_sp = self._average(self.g_sp, g_sp)

    def _average(self, old: float | None, new: float) -> float | None:
        if self.settings is None or not (math.isfinite(new) and new > 0):
            return old
        decay = self.settings.decay
        return new if old is None else decay * old + (1 - decay) * new

    def state_dict(self) -> dict[str, float | None]:
        """The moving averages, for the checkpoint."""
        return {"g_ssp": self.g_ssp, "g_sp": self.g_sp}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore `state_dict()`."""
        self.g_ssp, self.g_sp = state["g_ssp"], state["g_sp"]
