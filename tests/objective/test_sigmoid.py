"""The sigmoid likelihood against an independent computation in float64, pair by pair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import run_ranks
from helpers.small import small_tree
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config, Target
from m3i_scale.models.heads import Temperature
from m3i_scale.objective.contrastive import gather_candidates
from m3i_scale.objective.likelihoods import sigmoid
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.step_loss import StepLoss
from m3i_scale.objective.terms import Pair, embed, text_term

TEXT = {
    "name": "text",
    "image": "j",
    "representation": "text",
    "regularisation": "negatives",
    "likelihood": {"form": "sigmoid"},
}
ROWS, WIDTH = 16, 24
LOG_SCALE, BIAS = 1.9, -3.5


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit predictions and texts (ROWS, WIDTH), and which texts exist, of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    z_hat, z = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    z_hat = z_hat + z  # as after some training
    present = torch.rand(ROWS, generator=generator) < 0.8
    unit = (nn.functional.normalize(value, dim=1).to(dtype) for value in (z_hat, z))
    return *unit, present


def of_image_j(micro: int) -> Tensor:
    """Which text of its micro-batch each prediction is about: neighbours are mixed."""
    return torch.arange(micro) ^ 1


def expected() -> dict[str, Any]:
    """Loss, and its derivatives, by loops over pairs (arXiv 2303.15343, Algorithm 1)."""
    z_hat, z, present = (value.numpy() for value in drawn(torch.float64))
    t, loss = math.exp(LOG_SCALE), 0.0
    by_z_hat, by_z, by_log_scale, by_bias = np.zeros_like(z_hat), np.zeros_like(z), 0.0, 0.0
    for row in range(ROWS):
        own = row ^ 1
        for column in range(ROWS):
            if not (present[own] and present[column]):
                continue
            sign = 1 if column == own else -1
            cosine = float(z_hat[row] @ z[column])
            logit = sign * (t * cosine + BIAS)
            loss += math.log1p(math.exp(-logit)) / ROWS
            slope = -sign / (1 + math.exp(logit)) / ROWS
            by_z_hat[row] += slope * t * z[column]
            by_z[column] += slope * t * z_hat[row]
            by_log_scale += slope * t * cosine
            by_bias += slope
    return {
        "loss": loss, "z_hat": by_z_hat, "z": by_z, "log_scale": by_log_scale, "bias": by_bias,
    }  # fmt: skip


def found(world: World, folder: Path, micro_batches: int, dtype: str) -> dict[str, Tensor]:
    """This rank's mean loss and derivatives; with more than one micro-batch through `StepLoss`."""
    target = Target.model_validate(TEXT)
    config = Config.model_validate(small_tree(overrides={"objective": {
        "targets": [TEXT], "balance": None, "negatives": "batch"}}))  # fmt: skip
    kind = getattr(torch, dtype)
    temperature = Temperature(math.exp(-LOG_SCALE), learnable=True, bias=BIAS).to(kind)
    if dtype == "float64":
        temperature.log_scale.data.fill_(LOG_SCALE)  # not rounded
    micro = ROWS // (micro_batches * world.size)
    sample = of_image_j(micro)

    def rows(value: Tensor, number: int) -> Tensor:
        start = (number * world.size + world.rank) * micro
        return value[start : start + micro].clone()

    z_hat, z, present = drawn(kind)
    pairs, leaves = [], []
    for number in range(micro_batches):
        own = [rows(value, number).requires_grad_() for value in (z_hat, z)]
        exists = rows(present, number)
        leaves.append(own)
        pairs.append((own, exists, Pair(own[0], own[1][sample], None, exists[sample])))
    total = torch.zeros((), dtype=kind)
    if micro_batches == 1:
        ((own, exists, pair),) = pairs
        candidates = gather_candidates(own[1], exists)
        total = text_term(target, pair, sample, temperature, candidates).loss
        total.backward()
    else:
        step = StepLoss(config.objective)
        for _, _, pair in pairs:
            embedding = embed(target, pair, queued=False)
            step.collect(target, 0, embedding, temperature(embedding.whole).detach())
            step.keep({})
        step.close(nn.ModuleDict(), nn.ModuleDict())
        for _, _, pair in pairs:
            known = step.known(target, 0)
            loss = text_term(target, pair, sample, temperature, None, known).loss / micro_batches
            loss.backward()
            total = total + loss.detach()
            step.advance()
    gradients = [torch.stack([own[side].grad for own in leaves]) for side in range(2)]
    return {
        "loss": total.detach(), "z_hat": gradients[0], "z": gradients[1],
        "log_scale": temperature.log_scale.grad, "bias": temperature.bias.grad,
    }  # fmt: skip


def found_by_split(world: World, folder: Path, splits: list[int]) -> dict[str, dict[str, Tensor]]:
    """`found` of each number of micro-batches and each dtype."""
    return {
        f"{dtype} {split}": found(world, folder, split, dtype)
        for split in splits
        for dtype in ("float64", "float32")
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "splits"), [(1, [1, 4]), (2, [1, 2])])
def test_loss_and_gradients_of_the_global_batch(tmp_path: Path, ranks: int, splits: list[int]):
    by_rank = run_ranks(ranks, found_by_split, tmp_path, splits=splits)
    assert len(by_rank[0]) == 4
    for name in by_rank[0]:
        tolerance = 1e-12 if name.startswith("float64") else 5e-7
        require_equal([results[name] for results in by_rank], ranks, tolerance)


def require_equal(results: list[dict[str, Tensor]], ranks: int, tolerance: float) -> None:
    wanted = expected()
    for name in ("loss", "log_scale", "bias"):  # the mean over ranks
        value = sum(result[name].double().sum().item() for result in results) / ranks
        assert value == pytest.approx(wanted[name], rel=tolerance), name
    for name in ("z_hat", "z"):  # (A, W, M, D) -> the batch's order; a mean over ranks, too
        stacked = torch.stack([result[name] for result in results], 1) / ranks
        got, right = stacked.reshape(ROWS, WIDTH).double().numpy(), wanted[name]
        assert np.linalg.norm(got - right) <= tolerance * np.linalg.norm(right), name


def test_rows_and_columns_that_do_not_exist_take_no_part():
    scores = torch.randn(3, 5, requires_grad=True)
    exists = torch.tensor([True, False, True, True, False])
    losses = sigmoid(scores, torch.tensor([0, -1, 3]), candidate_exists=exists)
    assert losses[1] == 0
    alone = sigmoid(
        scores[[0, 2]][:, exists], torch.tensor([0, 2]), candidate_exists=torch.ones(3).bool()
    )
    torch.testing.assert_close(losses[[0, 2]], alone)
    losses.sum().backward()
    assert (scores.grad[:, ~exists] == 0).all()
    assert (scores.grad[1] == 0).all()


def test_it_starts_as_published_and_has_no_bound():
    config = Config.model_validate(
        small_tree(overrides={"objective": {"targets": [TEXT], "balance": None}})
    )
    model = M3I(config.model, config.objective, config.data.image_size)
    part = model.temperatures["text"]
    assert part.log_scale.item() == pytest.approx(math.log(10))
    assert part.bias.item() == -10
    assert list(model.upper_bounds()) == []
    unlearned = TEXT | {"likelihood": {"form": "sigmoid", "learnable": False, "bias": -2.0}}
    fixed = Config.model_validate(
        small_tree(overrides={"objective": {"targets": [unlearned], "balance": None}})
    )
    part = M3I(fixed.model, fixed.objective, fixed.data.image_size).temperatures["text"]
    assert not list(part.parameters())
    assert part(torch.ones(1)).tolist() == [pytest.approx(10), -2.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"representation": "category"}, "one category, which a softmax tells from the others"),
        ({"likelihood": {"form": "sigmoid", "queue": 8}}, "queue"),
        ({"likelihood": {"form": "sigmoid", "temperature": 0}}, "temperature"),
    ],
)
def test_what_it_is_not_for_is_refused(changes: dict[str, Any], sentence: str):
    tree = small_tree(overrides={"objective": {"targets": [TEXT | changes], "balance": None}})
    with pytest.raises(ValueError, match=sentence):
        Config.model_validate(tree)


def test_groups_of_one_representation_share_the_form():
    softmax = TEXT | {"name": "other", "likelihood": {"form": "boltzmann", "temperature": 0.1}}
    tree = small_tree(overrides={"objective": {"targets": [TEXT, softmax], "balance": None}})
    with pytest.raises(ValueError, match=r"share one likelihood\.form, temperature and bias"):
        Config.model_validate(tree)
