"""The forms of P(z_y | z_hat_y) (arXiv 2211.09807, Section 3), and decorrelation of targets.

Each function computes in float32, of float64 inputs in float64, and, unless its docstring says
otherwise, returns one loss per row without reduction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_scale.models.precision import at_least_float32


def gaussian(prediction: Tensor, target: Tensor, *, sigma: float, over_dimensions: str) -> Tensor:
    """`||z_y - z_hat_y||^2 / (2 sigma^2)`: (..., D), (..., D) -> (...).

    `over_dimensions` "sum" is the formula; "mean" divides it by D, so that the loss does not grow
    with the width (with sigma^2 = 1/2 it is the mean squared error).
    """
    square = (at_least_float32(target) - at_least_float32(prediction)).square()
    distance = square.mean(-1) if over_dimensions == "mean" else square.sum(-1)
    return distance / (2 * sigma**2)


def boltzmann(
    scores: Tensor,
    positive: Tensor,
    *,
    candidate_exists: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`-log softmax(scores)[positive]`, `scores = z_hat_y . z' / tau`: (R, C), (R,) -> (R,).

    `positive` is the column of each row's own target; rows without one carry -1 and get loss 0.
    Columns where `candidate_exists` (C,) is False leave the sum over z', and smoothing spreads no
    probability over them.
    """
    scores = at_least_float32(scores)
    smoothing = label_smoothing if candidate_exists is None else 0.0
    if candidate_exists is not None:
        scores = scores.masked_fill(~candidate_exists, torch.finfo(torch.float32).min)
    # Rows without a target may have no candidate at all; they read column 0 and are set to zero.
    present = positive >= 0
    loss = F.cross_entropy(
        scores, positive.clamp(min=0), label_smoothing=smoothing, reduction="none"
    )
    if candidate_exists is not None and label_smoothing:
        logs = scores.log_softmax(1).masked_fill(~candidate_exists, 0)
        mean = logs.sum(1) / candidate_exists.sum().clamp(min=1)
        loss = (1 - label_smoothing) * loss - label_smoothing * mean
    return torch.where(present, loss, torch.zeros_like(loss))


def sigmoid(logits: Tensor, positive: Tensor, *, candidate_exists: Tensor) -> Tensor:
    """`-sum_c log sigmoid(+-logits[c])`, plus at `positive`, else minus: (R, C), (R,) -> (R,).

    Every pair is a decision of its own (SigLIP, arXiv 2303.15343, Algorithm 1). `positive` and
    `candidate_exists` (C,) as in `boltzmann`: rows without a target get loss 0, and columns that
    do not exist leave the sum.
    """
    logits = at_least_float32(logits)
    columns = torch.arange(logits.shape[1], device=logits.device)
    signed = torch.where(columns == positive[:, None], logits, -logits)
    pairs = candidate_exists & (positive >= 0)[:, None]
    return -torch.where(pairs, F.logsigmoid(signed), 0).sum(1)


def decorrelation(prediction: Tensor, target: Tensor, *, weight: float) -> Tensor:
    """Redundancy reduction between two views (Barlow Twins): (R, D), (R, D) -> scalar.

    `C` is the correlation, over the rows, of the standardised dimensions of both sides; the loss is
    `sum_d (1 - C_dd)^2 + weight * sum_{d != e} C_de^2`. Call it with the rows of the global batch.
    """
    correlation = _standardise(prediction).T @ _standardise(target) / len(prediction)  # (D, D)
    diagonal = torch.diagonal(correlation)
    redundant = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + weight * redundant


def unigrad(prediction: Tensor, correlation: Tensor, *, over_dimensions: str) -> Tensor:
    """What is added to the Gaussian form by UniGrad (arXiv 2112.05141): (..., D), (D, D) -> (...).

    `z_hat^T C z_hat` with `C` the mean of `z z^T` over all targets of all ranks: predictions are
    kept off the directions that all targets share. SiameseIM regularises its dense targets so.
    `over_dimensions` as in `gaussian`.
    """
    prediction = at_least_float32(prediction)
    energy = (prediction @ correlation * prediction).sum(-1)
    return energy / prediction.shape[-1] if over_dimensions == "mean" else energy


def _standardise(rows: Tensor) -> Tensor:
    rows = at_least_float32(rows)
    centred = rows - rows.mean(0)
    return centred * torch.rsqrt(centred.square().mean(0) + 1e-5)


def gram(tokens: Tensor) -> Tensor:
    """Cosines of all pairs of an image's tokens: (B, M, D) -> (B, M, M).

    What Gram anchoring compares (DINOv3, arXiv 2508.10104, Section 4): where two networks agree
    about which patches look alike, and neither their widths nor a rotation of features matter.
    """
    unit = normalise(tokens, "l2")
    return unit @ unit.mT


def normalise(rows: Tensor, kind: str) -> Tensor:
    """Normalise vectors (..., D).

    "none"; "l2", unit length; "layer_norm", without affine part; "norm_pix", MAE's standardised
    patch, which differs from it by the unbiased variance; "instance_norm", each channel over the
    patches of one image (..., N, D), which removes everything that all patches share, their colour.
    """
    rows = at_least_float32(rows)
    if kind == "norm_pix":
        variance, mean = torch.var_mean(rows, -1, keepdim=True)
        return (rows - mean) * torch.rsqrt(variance + 1e-6)
    if kind == "l2":
        return F.normalize(rows, dim=-1)
    if kind == "layer_norm":
        return F.layer_norm(rows, rows.shape[-1:], eps=1e-6)
    if kind == "instance_norm":
        variance, mean = torch.var_mean(rows, -2, correction=0, keepdim=True)
        return (rows - mean) * torch.rsqrt(variance + 1e-6)
    return rows
