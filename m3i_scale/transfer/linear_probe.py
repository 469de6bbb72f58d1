"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def label_scores(
    queries: Tensor,
    gallery: Tensor,
    gallery_label: Tensor,
    labels: int,
    *,
    penalty: float = 1e-3,
    iterations: int = 100,
) -> Tensor:
    """Fit a linear classifier on the gallery and score the queries.

    Features are standardised with the gallery's statistics. The loss is convex and all of the
    gallery is seen at once (L-BFGS with a line search, from zero), so the result depends on no
    seed, rate or order.

        mean cross-entropy + penalty / 2 * |W|^2

    Args:
        queries: (Q, E).
        gallery: (N, E).
        gallery_label: int64 (N,).
        labels: C, their number.
        penalty: weight of the squared norm of the weights (not of the biases).
        iterations: at most so many steps of L-BFGS.

    Returns:
        (Q, C) scores.
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
    return ((queries - mean) / std) @ weight.detach().T + bias.detach()
