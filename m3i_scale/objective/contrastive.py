"""Targets that are told apart, by a softmax or by sigmoids: who from whom, by which scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m3i_scale.config import Boltzmann, Sigmoid
from m3i_scale.models.precision import at_least_float32
from m3i_scale.objective.collectives import gather, own_columns
from m3i_scale.objective.figures import Term, figure
from m3i_scale.objective.key_queue import KeyQueue
from m3i_scale.objective.likelihoods import boltzmann, sigmoid


class Candidates(NamedTuple):
    """Targets of all ranks, gathered once for several groups."""

    keys: Tensor  # (C, D)
    exists: Tensor  # bool (C,)


class Among(NamedTuple):
    """Whom the rows are told from, where others than these rows have been gathered."""

    targets: Candidates
    columns: Tensor  # int64 (R,): of each row's own target, and own prediction
    predictions: Candidates | None = None  # of the other direction


def gather_candidates(keys: Tensor, exists: Tensor) -> Candidates:
    """Targets (B, D) of all ranks and which of them exist (B,); a collective, with gradient."""
    return Candidates(gather(keys), gather(exists))


def contrastive_term(
    likelihood: Boltzmann | Sigmoid,
    z_hat: Tensor,
    z: Tensor,
    present: Tensor,
    coefficients: Tensor,
    queue: KeyQueue | None = None,
    among: Among | None = None,
) -> Term:
    """Row r of z_hat (R, D) belongs to row r of z (R, D) where present (R,).

    `coefficients` (1,) or (2,): those of logits, as `models.heads.Temperature` gives them.
    """
    targets = among and (among.targets, among.columns)
    scores, exists, positive = _scores(likelihood, z_hat, z, present, queue, targets)
    scores = logits(scores, coefficients)  # (R, C)
    if isinstance(likelihood, Sigmoid):
        losses = sigmoid(scores, positive, candidate_exists=exists)
        return classification_term(
            losses, scores.masked_fill(~exists, -torch.inf), positive, coefficients
        )
    losses = boltzmann(
        scores, positive, candidate_exists=exists, label_smoothing=likelihood.label_smoothing
    )
    if likelihood.symmetric:
        predictions = among and among.predictions and (among.predictions, among.columns)
        # Predictions may stand in another order than candidates, which texts bring along.
        reverse, predicted, own = _scores(likelihood, z, z_hat, present, None, predictions)
        reverse_losses = boltzmann(
            logits(reverse, coefficients),
            own,
            candidate_exists=predicted,
            label_smoothing=likelihood.label_smoothing,
        )
        losses = (losses + reverse_losses) / 2
    return classification_term(
        losses, scores.masked_fill(~exists, -torch.inf), positive, coefficients
    )


def logits(scores: Tensor, coefficients: Tensor) -> Tensor:
    """Scores of any shape, in float32, times 1 / tau and, with two coefficients, plus the bias."""
    scaled = at_least_float32(scores) * coefficients[0]
    return scaled + coefficients[1] if len(coefficients) > 1 else scaled


def _scores(
    likelihood: Boltzmann | Sigmoid,
    z_hat: Tensor,
    z: Tensor,
    present: Tensor,
    queue: KeyQueue | None,
    gathered: tuple[Candidates, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (R, C) against the candidates, which of them exist (C,), and the own one's column."""
    if likelihood.candidates == "own":
        scores = (z_hat * z).sum(-1, keepdim=True)
        exists = torch.ones(1, dtype=torch.bool, device=z.device)
        columns = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    elif likelihood.candidates == "global":
        (candidates, exists), columns = gathered or (
            gather_candidates(z, present),
            own_columns(torch.arange(len(z), device=z.device)),
        )
        scores = z_hat @ candidates.T
    else:
        scores, exists = z_hat @ z.T, present
        columns = torch.arange(len(z), device=z.device)
    if queue is not None:
        scores = torch.cat([scores, z_hat @ queue.keys.to(z_hat.dtype).T], 1)
        exists = torch.cat([exists, queue.exists])
    return scores, exists, torch.where(present, columns, -1)


def classification_term(
    losses: Tensor, scores: Tensor, positive: Tensor, coefficients: Tensor
) -> Term:
    """Mean of the losses (R,) of logits (R, C) whose right column is `positive`.

    Absent rows have positive -1 and loss 0, and count in the mean: L is an expectation over
    samples.
    """
    present = positive >= 0
    right = (scores.argmax(1) == positive) & present
    figures = {
        "loss": figure(losses.sum(), present.sum()),
        "accuracy": figure(right.sum(), present.sum()),
        "temperature": figure(1 / coefficients[0].detach()),
    }
    if len(coefficients) > 1:
        figures["bias"] = figure(coefficients[1])
    return Term(losses.mean(), figures)
