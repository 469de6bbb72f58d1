"""DINO's losses against a plain computation of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers import coco as small
from m3i_scale.config.detection import Dino
from m3i_scale.tasks.detection import dino as dino_module
from m3i_scale.tasks.detection.dino_loss import DinoLoss, Predicted, Target
from m3i_scale.tasks.detection.networks import build_detector

QUERIES, CATEGORIES = 4, 3


def giou(a, b) -> float:
    """Of two boxes as centre and size, by plain arithmetic."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    ax0, ax1, ay0, ay1 = ax - aw / 2, ax + aw / 2, ay - ah / 2, ay + ah / 2
    bx0, bx1, by0, by1 = bx - bw / 2, bx + bw / 2, by - bh / 2, by + bh / 2
    inner = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = aw * ah + bw * bh - inner
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inner / union - (hull - union) / hull


def focal(logit: float, wanted: int) -> float:
    p = 1 / (1 + math.exp(-logit))
    if wanted:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def cost(logits, box, label, target) -> float:
    p = 1 / (1 + math.exp(-logits[label]))
    classes = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    distance = sum(abs(x - y) for x, y in zip(box, target, strict=True))
    return 2 * classes + 5 * distance - 2 * giou(box, target)


def plain(predicted: Predicted, targets, count: float, chosen=None) -> tuple[float, float, float]:
    """Class, box and GIoU loss: the cheapest of all assignments, then plain sums."""
    classes = boxes = overlaps = 0.0
    for logits, found, target in zip(*[x.tolist() for x in predicted], targets, strict=True):
        labels, wanted = target.labels.tolist(), target.boxes.tolist()
        best = min(
            itertools.permutations(range(QUERIES), len(labels)),
            key=lambda order: sum(
                cost(logits[q], found[q], labels[i], wanted[i]) for i, q in enumerate(order)
            ),
        )
        of_query = {q: i for i, q in enumerate(best)}
        for q in range(QUERIES):
            for k in range(CATEGORIES):
                hit = q in of_query and labels[of_query[q]] == k
                if chosen is None or chosen[k]:
                    classes += focal(logits[q][k], hit)
        for q, i in of_query.items():
            boxes += 5 * sum(abs(x - y) for x, y in zip(found[q], wanted[i], strict=True))
            overlaps += 2 * (1 - giou(found[q], wanted[i]))
    return classes / count, boxes / count, overlaps / count


def case(seed: int, objects: tuple[int, ...]):
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        centre = torch.rand(*shape, 2, generator=generator) * 0.5 + 0.25
        return torch.cat([centre, torch.rand(*shape, 2, generator=generator) * 0.3 + 0.1], -1)

    predicted = Predicted(
        torch.randn(len(objects), QUERIES, CATEGORIES, generator=generator),
        boxes(len(objects), QUERIES),
    )
    targets = [
        Target(torch.randint(0, CATEGORIES, (n,), generator=generator), boxes(n)) for n in objects
    ]
    return predicted, targets


@pytest.mark.parametrize("objects", [(2, 3), (0, 4), (1, 0), (0, 0)])
@pytest.mark.parametrize("chosen", [None, [1.0, 0.0, 1.0]])
def test_losses_are_those_of_the_paper(objects, chosen):
    predicted, targets = case(sum(objects), objects)
    count = max(1, sum(objects))
    subset = None if chosen is None else torch.tensor(chosen)
    found = DinoLoss(Dino()).matched(predicted, targets, torch.tensor(float(count)), subset)
    wanted = plain(predicted, targets, count, chosen)
    assert (found.classes.item(), found.boxes.item(), found.giou.item()) == pytest.approx(
        wanted, rel=1e-4, abs=1e-6
    )


def test_the_loss_of_a_batch_is_the_sum_over_layers(monkeypatch):
    """Every layer is matched and measured once: proposals, decoder layers, denoising."""
    torch.manual_seed(0)
    networks = build_detector(small.detector("dino"), small.data()).train()
    kept = []
    real = DinoLoss.measured

    def measured(self, predicted, targets, pairs, count, chosen=None):
        terms = real(self, predicted, targets, pairs, count, chosen)
        kept.append((predicted, pairs, count, terms))
        return terms

    monkeypatch.setattr(DinoLoss, "measured", measured)
    found = networks(small.batch(3))
    layers = networks.head.decoder_layers
    assert len(kept) == 1 + 2 * layers
    total = sum(terms.total for *_, terms in kept)
    torch.testing.assert_close(found["loss"], total)
    groups = networks.head.denoising // 3
    restored = [entry for entry in kept if entry[0].logits.shape[1] == 2 * 3 * groups]
    assert len(restored) == layers
    for _, pairs, count, _ in restored:
        assert count == 2 * 3 * groups
        for queries, objects in pairs:  # the first half of each group is to be restored
            assert queries.tolist() == [6 * g + i for g in range(groups) for i in range(3)]
            assert objects.tolist() == [0, 1, 2] * groups


def test_objects_are_averaged_over_the_ranks(monkeypatch):
    torch.manual_seed(0)
    networks = build_detector(small.detector("dino"), small.data()).train()
    batch = small.batch(3)
    torch.manual_seed(0)
    alone = networks(batch)["loss"]
    monkeypatch.setattr(dino_module, "average", lambda value: value / 2)  # another rank has none
    torch.manual_seed(0)
    torch.testing.assert_close(networks(batch)["loss"], 2 * alone)


def test_federated_categories_are_those_of_the_batch_and_frequent_ones():
    config = Dino.model_validate({"federated": {"classes": 4, "power": 0.5}})
    counts = torch.tensor([0, 1, 1, 10_000, 5, 1, 0, 1])
    loss = DinoLoss(config, counts)
    targets = [
        Target(torch.tensor([6, 1]), torch.rand(2, 4)),
        Target(torch.tensor([1]), torch.rand(1, 4)),
    ]
    torch.manual_seed(0)
    drawn = torch.stack([loss.choose(targets, 8) for _ in range(200)])
    assert (drawn.sum(1) == 4).all()
    assert (drawn[:, [1, 6]] == 1).all()
    assert drawn[:, 0].sum() == 0  # no image shows it
    assert drawn[:, 3].sum() > 190 > drawn[:, 5].sum()
    assert loss.choose(targets, 4) is None
    many = [Target(torch.arange(7), torch.rand(7, 4))]
    assert loss.choose(many, 8).tolist() == [1] * 7 + [0]


def test_the_federated_loss_needs_counts():
    with pytest.raises(ValueError, match="images that show them"):
        DinoLoss(Dino.model_validate({"federated": {}}))
