"""The loss of an optimiser step whose samples are compared across its micro-batches.

A loss that tells all samples of a batch apart needs all embeddings at once, and the memory holds
the networks' activations of one micro-batch only. As in gradient caching (arXiv 2101.06983):

1. Every micro-batch runs without gradient and leaves its embeddings here (`collect`).
2. The loss of the whole batch, over all ranks, is computed from the embeddings, and its derivatives
   by them (`close`); no network takes part.
3. Every micro-batch runs again, with gradient, and its backward pass starts from these derivatives
   (`Given.term`).

Loss and gradients are those of one micro-batch that has all samples. Whatever else a loss knows of
other samples is collected in the same way: the moments that centre targets, the correlation of
UniGrad, and the keys of queues, which enter when the batch is complete. The teacher's encodings are
kept from the first pass for the second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Boltzmann, Gaussian, Objective, Sigmoid, Target
from m3i_scale.objective.centre import centre, local_moments
from m3i_scale.objective.collectives import average, gather, own_columns, rank_and_size
from m3i_scale.objective.contrastive import Among, Candidates, contrastive_term
from m3i_scale.objective.figures import Term, figure
from m3i_scale.objective.likelihoods import decorrelation
from m3i_scale.objective.terms import Embedding, Given, Known

Group = tuple[str, int]  # name of a target group, number of the shown view


class _Compared(NamedTuple):
    """What is compared with that of other micro-batches and ranks."""

    z_hat: Tensor  # (R, D)
    z: Tensor  # (R, D), not centred
    present: Tensor  # bool (R,)
    coefficients: Tensor | None  # (1,) or (2,): of the logits, where there are some


class _Part(NamedTuple):
    """What one micro-batch of this rank says about a group; None: nobody asks."""

    compared: _Compared | None
    moments: Tensor | None  # (D + 1,)
    products: Tensor | None  # (D, D): mean of z z^T
    mean: Tensor | None  # (D,): mean of z
    keys: Tensor | None  # (B, D)


class StepLoss:
    """One optimiser step, each of whose micro-batches runs twice."""

    def __init__(self, objective: Objective) -> None:
        self.collecting = True
        self._targets = {target.name: target for target in objective.targets if target.across}
        self._parts: dict[Group, list[_Part]] = defaultdict(list)
        self._known: dict[Group, list[Known]] = {}
        self._encodings: list[Mapping[Any, Any]] = []
        self._at = 0  # number of the micro-batch in the second pass

    def collect(
        self, target: Target, number: int, embedding: Embedding, coefficients: Tensor | None
    ) -> None:
        """Take in one group of one micro-batch, in the input's view `number`."""
        compared = moments = products = mean = None
        if target.centre != "none":
            moments = local_moments(embedding.whole)
        if target.correlates:
            z = embedding.z.flatten(0, -2)
            products, mean = z.T @ z / len(z), z.mean(0)
        if target.compares:
            assert embedding.z_hat is not None  # the model predicts where samples are compared
            z_hat, z, exists = embedding.z_hat, embedding.z, embedding.exists
            rows = z_hat.flatten(0, -2), z.flatten(0, -2), exists.flatten()
            compared = _Compared(*rows, coefficients)
        self._parts[target.name, number].append(
            _Part(compared, moments, products, mean, embedding.keys)
        )

    def keep(self, encodings: Mapping[Any, Any]) -> None:
        """Keep the teacher's encodings of a micro-batch for its second pass."""
        self._encodings.append(dict(encodings))

    @property
    def kept(self) -> Mapping[Any, Any]:
        """The encodings kept of the micro-batch that runs."""
        return {} if self.collecting else self._encodings[self._at]

    def known(self, target: Target, number: int) -> Known | None:
        """What the batch says about a group of the micro-batch that runs; None: nothing."""
        known = self._known.get((target.name, number))
        return None if known is None else known[self._at]

    def advance(self) -> None:
        """Go on to the next micro-batch of the second pass."""
        self._encodings[self._at] = {}
        self._at += 1

    def close(
        self, queues: nn.ModuleDict, centres: nn.ModuleDict, *, training: bool = True
    ) -> None:
        """Compute the losses of the whole batch (a collective); the second pass may begin.

        Args:
            queues: of keys, by the names of their groups.
            centres: of running centres, by the names of their groups.
            training: whether queues and running centres take in the batch.
        """
        for (name, number), parts in self._parts.items():
            target = self._targets[name]
            moments = _moments(parts, centres._modules.get(name))
            compared = [part.compared for part in parts if part.compared is not None]
            given: Sequence[Given | None] = [None] * len(parts)
            if compared:
                given = _compare(target, compared, moments, queues._modules.get(name))
            correlation = _correlation(parts, moments) if target.correlates else None
            self._known[name, number] = [Known(moments, correlation, each) for each in given]
        for name, queue in queues.items():
            if training:
                views = sorted(number for known, number in self._parts if known == name)
                keys = [_in_stream_order(self._parts[name, number]) for number in views]
                queue.put(torch.cat(keys))  # type: ignore[operator]
        self._parts.clear()
        self.collecting = False


def _moments(parts: list[_Part], running: Any) -> Tensor | None:
    """Of the whole batch, or with its part in the running ones."""
    own = [part.moments for part in parts if part.moments is not None]
    if not own:
        return None
    batch = average(torch.stack(own).mean(0))
    return batch if running is None else running.known(batch)


def _correlation(parts: list[_Part], moments: Tensor | None) -> Tensor:
    """Mean of z z^T over the whole batch, of centred z where there are moments: (D, D)."""
    pairs = [(part.products, part.mean) for part in parts]
    products = average(torch.stack([p for p, _ in pairs if p is not None]).mean(0))
    if moments is None:
        return products
    mean = average(torch.stack([m for _, m in pairs if m is not None]).mean(0))
    origin, square = moments[:-1], moments[-1]
    moved = torch.outer(mean, origin)
    centred = products - moved - moved.T + torch.outer(origin, origin)
    return centred / (square - origin.square().mean()).clamp(min=0).add(1e-6)


def _in_stream_order(parts: list[_Part]) -> Tensor:
    """Keys of all ranks and micro-batches, as the stream has the samples: (A * W * B, D)."""
    own = torch.stack([part.keys for part in parts if part.keys is not None])  # (A, B, D)
    _, size = rank_and_size()
    whole = gather(own).view(size, *own.shape)
    return whole.transpose(0, 1).flatten(0, 2)


@torch.enable_grad()
def _compare(
    target: Target, parts: list[_Compared], moments: Tensor | None, queue: Any
) -> list[Given]:
    """Losses of all micro-batches of this rank, and their derivatives by its embeddings."""
    z_hats = [_leaf(part.z_hat, wanted=True) for part in parts]
    centred = [part.z if moments is None else centre(part.z, moments) for part in parts]
    zs = [_leaf(z, wanted=target.trains_target) for z in centred]
    if not isinstance(target.likelihood, Gaussian):
        return _contrast(target, target.likelihood, parts, z_hats, zs, queue)
    weight = target.redundancy_weight
    loss = decorrelation(gather(torch.cat(z_hats)), gather(torch.cat(zs)), weight=weight)
    (len(parts) * loss).backward()  # the sum of all micro-batches'
    term = Term(loss.detach(), {"loss": figure(loss)})
    return [Given(term, a.grad, b.grad, None) for a, b in zip(z_hats, zs, strict=True)]


def _contrast(
    target: Target,
    likelihood: Boltzmann | Sigmoid,
    parts: list[_Compared],
    z_hats: list[Tensor],
    zs: list[Tensor],
    queue: Any,
) -> list[Given]:
    """One micro-batch's rows at a time, so that scores need no more memory than they would alone.

    Derivatives by the candidates add up over the micro-batches and return to the ranks at once.
    """
    shared = None
    if likelihood.candidates != "own":
        predictions = z_hats if target.both_directions else None
        shared = _Shared(zs, predictions, [part.present for part in parts])
    found = []
    for n, (part, z_hat, z) in enumerate(zip(parts, z_hats, zs, strict=True)):
        among = None if shared is None else shared.among(n)
        assert part.coefficients is not None  # there are logits
        leaf = _leaf(part.coefficients, wanted=True)
        term = contrastive_term(likelihood, z_hat, z, part.present, leaf, queue, among)
        term.loss.backward()
        found.append((term._replace(loss=term.loss.detach()), leaf.grad))
    if shared is not None:
        shared.give_back()
    return [
        Given(term, z_hat.grad, z.grad, coefficients)
        for (term, coefficients), z_hat, z in zip(found, z_hats, zs, strict=True)
    ]


class _Shared:
    """Candidates of all micro-batches and ranks, whose derivatives add up before they go back.

    Args:
        zs: targets (R, D) of each micro-batch of this rank.
        z_hats: its predictions (R, D), where they are candidates, too.
        present: bool (R,) each.
    """

    def __init__(
        self, zs: list[Tensor], z_hats: list[Tensor] | None, present: list[Tensor]
    ) -> None:
        self._exists = gather(torch.cat(present))
        sides = [zs] if z_hats is None else [zs, z_hats]
        self._gathered = [gather(torch.cat(side)) for side in sides]
        self._leaves = [_leaf(whole, wanted=whole.requires_grad) for whole in self._gathered]
        rows = own_columns(torch.arange(sum(map(len, zs)), device=zs[0].device))
        self._rows = rows.split([len(z) for z in zs])

    def among(self, micro_batch: int) -> Among:
        """What the rows of a micro-batch are told from."""
        sides = [Candidates(leaf, self._exists) for leaf in self._leaves]
        return Among(sides[0], self._rows[micro_batch], sides[1] if sides[1:] else None)

    def give_back(self) -> None:
        """Add the candidates' derivatives to those of the embeddings they are (a collective)."""
        for whole, leaf in zip(self._gathered, self._leaves, strict=True):
            if leaf.grad is not None:
                whole.backward(leaf.grad)


def _leaf(value: Tensor, *, wanted: bool) -> Tensor:
    return value.detach().clone().requires_grad_(wanted)
