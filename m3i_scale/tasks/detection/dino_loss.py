"""The losses of DINO (arXiv 2203.03605): focal, L1 and generalised IoU after a matching.

Sums over objects are divided by a count of objects, which the caller averages over the ranks.
Every term is a sum over what is there: a batch without objects has the same terms, and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from m3i_scale.config.detection import Dino, Federated

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
_Pairs = list[tuple[Tensor, Tensor]]


class Predicted(NamedTuple):
    """Of one layer, float32: logits (B, Q, K), boxes (B, Q, 4) as centre and size from 0 to 1."""

    logits: Tensor
    boxes: Tensor


class Target(NamedTuple):
    """Of one image: labels (N,), boxes (N, 4) as centre, size in shares of the image."""

    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Terms:
    """The three losses of one layer, weighted."""

    classes: Tensor
    boxes: Tensor
    giou: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.classes + self.boxes + self.giou


class DinoLoss:
    """Matches predictions with objects and measures them.

    Args:
        config: weights and costs.
        image_counts: (K,) images with each category, for the federated loss.
    """

    def __init__(self, config: Dino, image_counts: Tensor | None = None) -> None:
        self.config, self.image_counts = config, image_counts
        if config.federated is not None and image_counts is None:
            raise ValueError("the federated loss draws categories by the images that show them")
        self._matcher = RTDetrHungarianMatcher(
            SimpleNamespace(
                matcher_class_cost=config.class_cost,
                matcher_bbox_cost=config.box_weight,
                matcher_giou_cost=config.giou_weight,
                matcher_alpha=ALPHA,
                matcher_gamma=GAMMA,
                use_focal_loss=True,
            )
        )

    def match(self, predicted: Predicted, targets: Sequence[Target]) -> _Pairs:
        """Of each image, matched queries and their objects."""
        device = predicted.logits.device
        if not sum(len(target.labels) for target in targets):
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return [(none, none)] * len(targets)
        named = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
        outputs = {"logits": predicted.logits, "pred_boxes": predicted.boxes}
        return [(i.to(device), j.to(device)) for i, j in self._matcher(outputs, named)]

    def matched(
        self,
        predicted: Predicted,
        targets: Sequence[Target],
        count: Tensor,
        chosen: Tensor | None = None,
    ) -> Terms:
        """Losses of the queries of a layer, each object matched with one of them."""
        pairs = self.match(predicted, targets)
        return self.measured(predicted, targets, pairs, count, chosen)

    def measured(
        self,
        predicted: Predicted,
        targets: Sequence[Target],
        pairs: _Pairs,
        count: Tensor,
        chosen: Tensor | None = None,
    ) -> Terms:
        """Losses of a layer whose queries and objects are paired, divided by `count`.

        `chosen` (K,): see `choose`.
        """
        config = self.config
        image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
        query = torch.cat([queries for queries, _ in pairs])
        labels = torch.cat([t.labels[j] for t, (_, j) in zip(targets, pairs, strict=True)])
        boxes = torch.cat([t.boxes[j] for t, (_, j) in zip(targets, pairs, strict=True)])
        wanted = torch.zeros_like(predicted.logits)
        wanted[image, query, labels] = 1
        found = predicted.boxes[image, query]
        return Terms(
            config.class_weight * _focal(predicted.logits, wanted, chosen).sum() / count,
            config.box_weight * F.l1_loss(found, boxes, reduction="sum") / count,
            config.giou_weight * self.apart(found, boxes) / count,
        )

    def apart(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Sum of 1 - generalised IoU of boxes (N, 4)."""
        corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted)]
        loss: Tensor = generalized_box_iou_loss(*corners, reduction="sum")
        return loss

    def choose(self, targets: Sequence[Target], categories: int) -> Tensor | None:
        """Categories (K,) that the class loss of a batch counts: 1 or 0; None: all.

        Those of its objects, and as many others as `federated.classes` leaves room for, drawn from
        the default generator in proportion to their images ** power.
        """
        federated: Federated | None = self.config.federated
        if federated is None or categories <= federated.classes:
            return None
        assert self.image_counts is not None
        labels = torch.cat([target.labels for target in targets])
        chosen = torch.zeros(categories, device=labels.device)
        chosen[labels] = 1
        room = federated.classes - int(chosen.sum())
        weights = self.image_counts.to(chosen) ** federated.power * (1 - chosen)
        room = min(room, int((weights > 0).sum()))
        if room > 0:
            chosen[torch.multinomial(weights, room, replacement=False)] = 1
        return chosen


def _focal(logits: Tensor, wanted: Tensor, chosen: Tensor | None) -> Tensor:
    """The focal loss (arXiv 1708.02002) of each logit."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probability = logits.sigmoid()
    missed = wanted * (1 - probability) + (1 - wanted) * probability
    weight = ALPHA * wanted + (1 - ALPHA) * (1 - wanted)
    loss = weight * missed**GAMMA * entropy
    return loss if chosen is None else loss * chosen
