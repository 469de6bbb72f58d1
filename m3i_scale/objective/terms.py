"""The loss of one target group from its predictions and targets: `-log P(z_y | z_hat_y)`.

A group's regularisation and likelihood decide here which prediction belongs to which target, which
side gets a gradient and which targets are negatives. Each term also returns the figures that show
its progress.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Boltzmann, Gaussian, Target
from m3i_scale.models.positions import Grid
from m3i_scale.objective.centre import RunningCentre, centre, moments
from m3i_scale.objective.collapse import (
    constant_share,
    position_share,
)
from m3i_scale.objective.collectives import average, gather, own_columns
from m3i_scale.objective.contrastive import (
    Among,
    Candidates,
    classification_term,
    contrastive_term,
    logits,
)
from m3i_scale.objective.figures import Term, collapse_figures, figure
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

    z_hat: Tensor | None  # (B, M, D) or (B, D); None where nothing was predicted
    targets: Tensor  # (B, N, D) or (B, D): all there are in the target's view
    chosen: Tensor | None = None  # int64 (B, M): which of them is predicted; None: all, in order
    present: Tensor | None = None  # bool (B, M) or (B,): which predictions have a target


class Embedding(NamedTuple):
    """What the loss of one group is a function of: normalised, float32, targets not centred."""

    z_hat: Tensor | None  # (B, M, D) or (B, D); None where nothing was predicted
    whole: Tensor  # (B, N, D) or (B, D): all targets there are in the view
    chosen: Tensor | None  # as in `Pair`
    present: Tensor | None
    keys: Tensor | None  # (B, D): what the group's queue takes in, where it has one

    def choose(self, whole: Tensor) -> Tensor:
        """Those of all targets that are predicted."""
        return whole if self.chosen is None else take(whole, self.chosen)

    @property
    def z(self) -> Tensor:
        """The targets that are predicted, (B, M, D) or (B, D)."""
        return self.choose(self.whole)

    @property
    def exists(self) -> Tensor:
        """Which predictions have a target, bool (B, M) or (B,)."""
        if self.present is not None:
            return self.present
        assert self.z_hat is not None  # there are predictions where somebody asks
        return torch.ones(self.z_hat.shape[:-1], dtype=torch.bool, device=self.z_hat.device)


class Given(NamedTuple):
    """A group's term that was computed before, and its derivatives (see `step_loss`)."""

    term: Term
    by_z_hat: Tensor | None  # (R, D)
    by_z: Tensor | None  # (R, D)
    by_coefficients: Tensor | None  # (1,) or (2,): by 1 / tau and the bias

    def inject(self, z_hat: Tensor, z: Tensor, temperature: nn.Module | None) -> Term:
        """The term, with a gradient to the embeddings (R, D) as they are computed now."""
        flat = []
        for tensor, derivative in ((z_hat, self.by_z_hat), (z, self.by_z)):
            if derivative is not None:
                flat += [tensor, derivative]
        if self.by_coefficients is not None:
            assert temperature is not None  # who is told apart by logits has one
            flat += [temperature(z_hat), self.by_coefficients]
        return self.term._replace(loss=_Injected.apply(self.term.loss, *flat))


class _Injected(torch.autograd.Function):
    """A known loss with known derivatives, behind tensors that have a history."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        products = [gradient * derivative for derivative in ctx.saved_tensors]
        return (None, *(entry for product in products for entry in (product, None)))


class Known(NamedTuple):
    """What a whole batch says about one group of one of its micro-batches (see `step_loss`)."""

    moments: Tensor | None  # (D + 1,): to centre by
    correlation: Tensor | None  # (D, D): UniGrad's
    given: Given | None  # the term itself, where samples are compared


def choose_patches(
    target: Target,
    role: Role,
    view: View,
    mixed: MixedBatch,
    grid: Grid,
    features: Tensor | None,
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
        features: of the input, (B, N, D); with `match: similarity`.
        others: the target encoder's features (B, N, D); with `match: similarity`.
        masked: whether the loss covers hidden patches only.
    """
    if masked:
        return role.hidden, None
    if not (target.tokenwise and target.view == "other"):
        return None, None
    if target.match == "position":
        return nearest_patches(role, view, mixed, grid)
    assert features is not None  # Target refuses similarity of pixels
    assert others is not None
    return most_similar(take(features, role.visible), others), None


def image_term(
    target: Target,
    pair: Pair,
    temperature: nn.Module | None = None,
    queue: KeyQueue | None = None,
    running: RunningCentre | None = None,
    known: Known | None = None,
) -> Term:
    """The loss of pixels, features or global features.

    `temperature` belongs to softmax and sigmoid, `queue` to their negatives, `running` to
    `centre: running`. `known` is what the batch says, where it is not the micro-batch that does.
    """
    embedding = embed(target, pair, queued=queue is not None)
    z_hat, whole, keys = embedding.z_hat, embedding.whole, embedding.keys
    assert z_hat is not None
    constant = figure(constant_share(whole))
    if known is not None:
        keys = None  # the queue has them
        whole = whole if known.moments is None else centre(whole, known.moments)
    elif target.centre == "batch":
        whole = centre(whole, moments(whole))
    elif running is not None:
        whole = running(whole)
    z = embedding.choose(whole)
    if known is not None and known.given is not None:
        term = known.given.inject(z_hat.flatten(0, -2), z.flatten(0, -2), temperature)
    elif isinstance(target.likelihood, Gaussian):
        correlation = None if known is None else known.correlation
        term = _gaussian_term(target, target.likelihood, z_hat, z, pair.present, correlation)
    else:
        assert temperature is not None
        term = contrastive_term(
            target.likelihood,
            z_hat.flatten(0, -2),
            z.flatten(0, -2),
            embedding.exists.flatten(),
            temperature(z_hat),
            queue,
        )
    figures = {**collapse_figures(z_hat, whole), "constant": constant}
    if target.dense and not target.tokenwise:
        figures["mask_token_use"] = figure(position_share(z_hat))
    return Term(term.loss, {**term.figures, **figures}, keys)


def embed(target: Target, pair: Pair, *, queued: bool) -> Embedding:
    """Normalise predictions and targets of any group with embeddings, and make keys of a queue."""
    whole = pair.targets.detach() if target.regularisation == "stop_gradient" else pair.targets
    keys = None
    if queued:  # one key per image: of a map, its mean
        mean = whole if whole.dim() == 2 else whole.float().mean(1)
        keys = normalise(mean, target.normalise)
    z_hat = pair.z_hat
    if z_hat is not None:
        z_hat = normalise(z_hat, target.prediction_normalisation)
    return Embedding(z_hat, normalise(whole, target.normalise), pair.chosen, pair.present, keys)


def _gaussian_term(
    target: Target,
    likelihood: Gaussian,
    z_hat: Tensor,
    z: Tensor,
    present: Tensor | None,
    correlation: Tensor | None,
) -> Term:
    if target.regularisation == "decorrelation" and target.decorrelation == "barlow_twins":
        loss = decorrelation(gather(z_hat), gather(z), weight=target.redundancy_weight)
        return Term(loss, {"loss": figure(loss)})
    losses = gaussian(z_hat, z, sigma=likelihood.sigma, over_dimensions=likelihood.over_dimensions)
    if target.regularisation == "decorrelation":
        if correlation is None:
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
    pair: Pair,
    sample: Tensor,
    temperature: nn.Module,
    candidates: Candidates | None,
    known: Known | None = None,
) -> Term:
    """Texts of the batch told apart.

    Args:
        target: the group.
        pair: predictions and texts (B, E), unit length, and which texts exist (B,).
        sample: int64 (B,), the row of the batch that each prediction is about.
        temperature: makes logits of scores.
        candidates: the texts of all ranks in batch order, where they compete.
        known: what the batch says, where it is not the micro-batch that does.
    """
    assert not isinstance(target.likelihood, Gaussian)  # Target refuses it
    z_hat, z, present = pair.z_hat, pair.targets, pair.present
    assert z_hat is not None
    assert present is not None
    if known is not None and known.given is not None:
        term = known.given.inject(z_hat, z, temperature)
    else:
        among = candidates and Among(candidates, own_columns(sample))
        coefficients = temperature(z_hat)
        term = contrastive_term(target.likelihood, z_hat, z, present, coefficients, among=among)
    return term._replace(figures=term.figures | collapse_figures(z_hat, z, present))


def category_term(
    target: Target, pooled: Tensor, scores: Tensor, category: Tensor, temperature: nn.Module
) -> Term:
    """Softmax over the classifier's weights, the category embeddings.

    pooled (B, E) gave scores (B, C); category int64 (B,) is -1 where there is none.
    """
    assert isinstance(target.likelihood, Boltzmann)  # Target refuses the others
    coefficients = temperature(scores)
    scores = logits(scores, coefficients)
    likelihood = target.likelihood
    losses = boltzmann(scores, category, label_smoothing=likelihood.label_smoothing)
    term = classification_term(losses, scores, category, coefficients)
    figures = collapse_figures(pooled, present=category >= 0)
    return term._replace(figures=term.figures | figures)
