"""The loss of one target group from its predictions and targets: `-log P(z_y | z_hat_y)`.

A group's regularisation and likelihood decide here which prediction belongs to which target, which
side gets a gradient and which targets are negatives. Each term also returns the figures that show
its progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Boltzmann, Gaussian, Target
from m3i_scale.models.positions import Grid
from m3i_scale.objective.centre import RunningCentre, centre, moments
from m3i_scale.objective.collapse import (
    constant_share,
    effective_rank,
    position_share,
    spread,
)
from m3i_scale.objective.collectives import average, gather, own_columns
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.key_queue import KeyQueue
from m3i_scale.objective.likelihoods import (
    boltzmann,
    decorrelation,
    gaussian,
    normalise,
    unigrad,
)
from m3i_scale.objective.roles import Role, View, most_similar, nearest_patches, take


class Pair(NamedTuple):
    """Predictions and targets of one group; the first dimension is that of the micro-batch."""

    z_hat: Tensor  # (B, M, D) or (B, D)
    targets: Tensor  # (B, N, D) or (B, D): all there are in the target's view
    chosen: Tensor | None = None  # int64 (B, M): which of them is predicted; None: all, in order
    present: Tensor | None = None  # bool (B, M) or (B,): which predictions have a target


class Term(NamedTuple):
    """One group's loss (mean over the batch) and its figures, each a pair (sum, count)."""

    loss: Tensor
    figures: dict[str, Tensor]
    keys: Tensor | None = None  # (B, D): what the group's queue takes in, where it has one


def mean_term(terms: Sequence[Term]) -> Term:
    """The mean of a group's losses over several inputs of the same samples."""
    figures = {name: sum(t.figures[name] for t in terms) for name in terms[0].figures}
    keys = [term.keys for term in terms if term.keys is not None]
    loss = sum((term.loss for term in terms[1:]), terms[0].loss) / len(terms)
    return Term(loss, figures, torch.cat(keys) if keys else None)  # type: ignore[arg-type]


def choose_patches(
    target: Target,
    role: Role,
    view: View,
    mixed: MixedBatch,
    grid: Grid,
    features: Tensor,
    others: Tensor | None,
    *,
    masked: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Which patches of its view a dense group predicts, `chosen` and `present` of `Pair`.

    Args:
        target: the group.
        role: its image in the input.
        view: of the target.
        mixed: has the crops.
        grid: rows and columns of the patches.
        features: of the input, (B, N, D).
        others: the target encoder's features (B, N, D), of targets that are not pixels.
        masked: whether the loss covers hidden patches only.
    """
    if masked:
        return role.hidden, None
    if not (target.tokenwise and target.view == "other"):
        return None, None
    if target.match == "position":
        return nearest_patches(role, view, mixed, grid)
    assert others is not None  # Target refuses similarity of pixels
    return most_similar(take(features, role.visible), others), None


def image_term(
    target: Target,
    pair: Pair,
    temperature: nn.Module | None = None,
    queue: KeyQueue | None = None,
    running: RunningCentre | None = None,
) -> Term:
    """The loss of pixels, features or global features.

    `temperature` belongs to the Boltzmann form, `queue` to its negatives, `running` to
    `centre: running`.
    """
    whole = pair.targets.detach() if target.regularisation == "stop_gradient" else pair.targets
    keys = None
    if queue is not None:  # one key per image: of a map, its mean
        mean = whole if whole.dim() == 2 else whole.float().mean(1)
        keys = normalise(mean, target.normalise)
    whole = normalise(whole, target.normalise)
    constant = figure(constant_share(whole))
    if target.centre == "batch":
        whole = centre(whole, moments(whole))
    elif running is not None:
        whole = running(whole)
    z_hat = normalise(pair.z_hat, target.prediction_normalisation)
    z = whole if pair.chosen is None else take(whole, pair.chosen)
    if isinstance(target.likelihood, Gaussian):
        term = _gaussian_term(target, target.likelihood, z_hat, z, pair.present)
    else:
        assert temperature is not None
        present = pair.present
        if present is None:
            present = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
        term = softmax_term(
            target.likelihood,
            z_hat.flatten(0, -2),
            z.flatten(0, -2),
            present.flatten(),
            temperature,
            queue,
        )
    figures = {**collapse_figures(z_hat, whole), "constant": constant}
    if target.dense and not target.tokenwise:
        figures["mask_token_use"] = figure(position_share(z_hat))
    return Term(term.loss, {**term.figures, **figures}, keys)


def _gaussian_term(
    target: Target, likelihood: Gaussian, z_hat: Tensor, z: Tensor, present: Tensor | None
) -> Term:
    if target.regularisation == "decorrelation" and target.decorrelation == "barlow_twins":
        loss = decorrelation(gather(z_hat), gather(z), weight=target.redundancy_weight)
        return Term(loss, {"loss": figure(loss)})
    losses = gaussian(z_hat, z, sigma=likelihood.sigma, over_dimensions=likelihood.over_dimensions)
    if target.regularisation == "decorrelation":
        rows = z.detach().flatten(0, -2)
        correlation = average(rows.T @ rows / len(rows))
        energy = unigrad(z_hat, correlation, over_dimensions=likelihood.over_dimensions)
        losses = losses + target.redundancy_weight * energy / (2 * likelihood.sigma**2)
    if present is not None:  # the others have loss 0 and count in the mean
        losses = torch.where(present, losses, torch.zeros_like(losses))
    loss = losses.mean()
    return Term(loss, {"loss": figure(loss)})


def text_term(
    target: Target,
    z_hat: Tensor,
    texts: Tensor,
    has_text: Tensor,
    sample: Tensor,
    temperature: nn.Module,
    candidates: Candidates | None,
) -> Term:
    """Softmax over the texts of the batch.

    Args:
        target: the group.
        z_hat: predictions (B, E), unit length.
        texts: embeddings (B, E) of this rank's texts, in batch order.
        has_text: which of them exist, bool (B,).
        sample: int64 (B,), the row of the batch that each prediction is about.
        temperature: divides the scores.
        candidates: the texts of all ranks, where they compete.
    """
    assert isinstance(target.likelihood, Boltzmann)  # Target refuses the other
    z, present = texts[sample], has_text[sample]
    gathered = candidates and (candidates, sample)
    term = softmax_term(target.likelihood, z_hat, z, present, temperature, gathered=gathered)
    return term._replace(figures=term.figures | collapse_figures(z_hat, z, present))


def category_term(
    target: Target, pooled: Tensor, logits: Tensor, category: Tensor, temperature: nn.Module
) -> Term:
    """Softmax over the classifier's weights, the category embeddings.

    pooled (B, E) gave logits (B, C); category int64 (B,) is -1 where there is none.
    """
    assert isinstance(target.likelihood, Boltzmann)  # Target refuses the other
    scores, tau = temperature(logits)
    likelihood = target.likelihood
    losses = boltzmann(scores, category, label_smoothing=likelihood.label_smoothing)
    term = classification_term(losses, scores, category, tau)
    figures = collapse_figures(pooled, present=category >= 0)
    return term._replace(figures=term.figures | figures)


class Candidates(NamedTuple):
    """Targets of all ranks, gathered once for several groups."""

    keys: Tensor  # (C, D)
    exists: Tensor  # bool (C,)


def gather_candidates(keys: Tensor, exists: Tensor) -> Candidates:
    """Targets (B, D) of all ranks and which of them exist (B,); a collective, with gradient."""
    return Candidates(gather(keys), gather(exists))


def softmax_term(
    likelihood: Boltzmann,
    z_hat: Tensor,
    z: Tensor,
    present: Tensor,
    temperature: nn.Module,
    queue: KeyQueue | None = None,
    gathered: tuple[Candidates, Tensor] | None = None,
) -> Term:
    """Boltzmann form; row r of z_hat (R, D) belongs to row r of z (R, D) where present (R,).

    `gathered` are the candidates of all ranks, where they are known, and the row (R,) of each z
    among those of this rank.
    """
    scores, exists, positive = _scores(likelihood, z_hat, z, present, queue, gathered)
    scores, tau = temperature(scores)  # (R, C)
    losses = boltzmann(
        scores, positive, candidate_exists=exists, label_smoothing=likelihood.label_smoothing
    )
    if likelihood.symmetric:
        reverse, _, _ = _scores(likelihood, z, z_hat, present, None)
        reverse_losses = boltzmann(
            temperature(reverse)[0],
            positive,
            candidate_exists=exists,
            label_smoothing=likelihood.label_smoothing,
        )
        losses = (losses + reverse_losses) / 2
    return classification_term(losses, scores.masked_fill(~exists, -torch.inf), positive, tau)


def _scores(
    likelihood: Boltzmann,
    z_hat: Tensor,
    z: Tensor,
    present: Tensor,
    queue: KeyQueue | None,
    gathered: tuple[Candidates, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (R, C) against the candidates, which of them exist (C,), and the own one's column."""
    everywhere = likelihood.candidates == "global"
    if likelihood.candidates == "own":
        scores = (z_hat * z).sum(-1, keepdim=True)
        exists = torch.ones(1, dtype=torch.bool, device=z.device)
        columns = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    elif everywhere:
        (candidates, exists), rows = gathered or (
            gather_candidates(z, present),
            torch.arange(len(z), device=z.device),
        )
        scores = z_hat @ candidates.T
        columns = own_columns(rows, gathered=True)
    else:
        scores, exists = z_hat @ z.T, present
        columns = torch.arange(len(z), device=z.device)
    if queue is not None:
        scores = torch.cat([scores, z_hat @ queue.keys.to(z_hat.dtype).T], 1)
        exists = torch.cat([exists, queue.exists])
    return scores, exists, torch.where(present, columns, -1)


def classification_term(losses: Tensor, scores: Tensor, positive: Tensor, tau: Tensor) -> Term:
    """Mean of the losses (R,) of a softmax over scores (R, C), whose right column is `positive`.

    Absent rows have positive -1 and loss 0, and count in the mean: L is an expectation over
    samples.
    """
    present = positive >= 0
    right = (scores.argmax(1) == positive) & present
    figures = {
        "loss": figure(losses.sum(), present.sum()),
        "accuracy": figure(right.sum(), present.sum()),
        "temperature": figure(tau),
    }
    return Term(losses.mean(), figures)


def collapse_figures(
    z_hat: Tensor, targets: Tensor | None = None, present: Tensor | None = None
) -> dict[str, Tensor]:
    """Spread and effective rank of predictions and, where they are given, of targets.

    Both are (B, ..., D); rows where `present` (B,) is False do not count.
    """
    enough = torch.ones((), device=z_hat.device)
    if present is not None:
        enough = (present.sum() > 1).float()
    sides = {"_prediction": z_hat} | ({} if targets is None else {"": targets})
    return {
        f"{name}{side}": figure(function(vectors.detach(), present) * enough, enough)
        for side, vectors in sides.items()
        for name, function in (("spread", spread), ("rank", effective_rank))
    }


def student_figures(features: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Rank and spread of z_x (B, N, D), pooled: the mean of the tokens of image i, seen (B, N)."""
    weight = seen.to(features.dtype)
    pooled = (weight[:, None] @ features.detach())[:, 0] / weight.sum(1, keepdim=True)  # (B, D)
    return {
        "student/rank": figure(effective_rank(pooled)),
        "student/spread": figure(spread(pooled)),
    }


def figure(value: Tensor, count: int | Tensor = 1) -> Tensor:
    """A (sum, count) pair, so that means over ranks and steps are exact."""
    value = value.detach().float()
    if not isinstance(count, Tensor):
        count = torch.full_like(value, count)  # a tensor made of a number would wait for the GPU
    return torch.stack([value, count.float()])
