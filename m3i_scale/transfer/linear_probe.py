"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(
    gallery: Tensor,
    gallery_label: Tensor,
    labels: int,
    *,
    penalty: float = 1e-3,
    iterations: int = 100,
) -> Callable[[Tensor], Tensor]:
    """Fit a linear classifier on the gallery.

    Features are standardised with the gallery's statistics. The loss is convex and all of the
    gallery is seen at once (L-BFGS with a line search, from zero), so the result depends on no
    seed, rate or order.

        mean cross-entropy + penalty / 2 * |W|^2

    Args:
        gallery: (N, E).
        gallery_label: int64 (N,).
        labels: C, their number.
        penalty: weight of the squared norm of the weights (not of the biases).
        iterations: at most so many steps of L-BFGS.

    Returns:
        A function from queries (Q, E) to scores (Q, C).
    """
    mean, std = gallery.mean(0), gallery.std(0).clamp(min=1e-6)
    x = (gallery - mean) / std
    weight = torch.zeros(labels, x.shape[1], requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, gallery_label)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda queries: ((queries - mean) / std) @ weight.T + bias
