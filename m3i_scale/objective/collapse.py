"""Figures of targets and predictions that show a collapse while it happens.

Each figure costs at most one pass over its input and never waits for the device: the effective rank
uses the products of at most 256 vectors, without a decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 256  # vectors from which a rank is estimated
ROUNDING = 1e-12  # of the squares: what the deviations of equal float32 vectors amount to


@torch.no_grad()
def spread(vectors: Tensor, present: Tensor | None = None) -> Tensor:
    """Standard deviation over the samples (first dimension), averaged over all others: (B, ..., D).

    0 when all images have the same target. Positions are kept apart: a map that depends on the
    position alone is a collapse, too. Rows where `present` (B,) is False do not count.
    """
    deviation, count = _centre(vectors.float(), present)
    variance = deviation.square().sum(0) / (count - 1).clamp(min=1)
    return variance.sqrt().mean()


@torch.no_grad()
def effective_rank(vectors: Tensor, present: Tensor | None = None) -> Tensor:
    """Number of directions that vectors (B, ..., D) spread into: `(sum l)^2 / sum l^2`.

    `l` are the eigenvalues of the covariance over the samples, each position about its own mean.
    It is D where all directions vary alike, 1 where all vectors lie on a line, 0 where they are
    equal, and at most one less than the number of samples (the exponential of the spectrum's
    second-order Renyi entropy, also called participation ratio).
    """
    vectors = _sample(vectors.float())
    deviation, _ = _centre(vectors, None if present is None else present[:SAMPLE])
    rows = deviation.flatten(0, -2)  # (R, D)
    products = rows @ rows.T  # its eigenvalues are those of the covariance, times R
    trace, squares = products.diagonal().sum(), products.square().sum()
    varies = trace > ROUNDING * vectors.square().sum()
    return torch.where(varies, trace.square() / squares, torch.zeros_like(trace))


@torch.no_grad()
def position_share(predictions: Tensor) -> Tensor:
    """Share of the variance of predictions (B, M, D) that lies between an image's positions.

    0: all mask tokens of an image predict the same, positions are not used. 1: all images get the
    same map, the image is not used.
    """
    predictions = predictions.float()
    within = predictions.var(1, unbiased=False).mean()
    total = predictions.flatten(0, 1).var(0, unbiased=False).mean()
    varies = total > ROUNDING * predictions.square().mean()
    return torch.where(varies, within / total, torch.zeros_like(total))


@torch.no_grad()
def constant_share(vectors: Tensor) -> Tensor:
    """Share of the mean square of vectors (B, ..., D) that is one constant vector's: 0 to 1."""
    rows = vectors.float().flatten(0, -2)
    square = rows.square().sum(-1).mean()
    return rows.mean(0).square().sum() / square.clamp(min=torch.finfo(torch.float32).tiny)


def _centre(vectors: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Deviations from the mean over the present samples, 0 elsewhere; and the number of samples."""
    if present is None:
        return vectors - vectors.mean(0), vectors.new_full((), float(len(vectors)))
    weight = present.float().view(-1, *[1] * (vectors.dim() - 1))
    count = present.float().sum()
    mean = (vectors * weight).sum(0) / count.clamp(min=1)
    return (vectors - mean) * weight, count


def _sample(vectors: Tensor) -> Tensor:
    """At most SAMPLE of the vectors: of the first samples, at positions evenly apart."""
    vectors = vectors[:SAMPLE]
    if vectors.dim() == 2:
        return vectors
    count = max(1, SAMPLE // len(vectors))
    step = -(-vectors.shape[1] // count)
    return vectors[:, ::step]
