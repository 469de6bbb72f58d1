"""Centred targets against a computation of their own; in whole methods: test_published.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from m3i_scale.objective.centre import RunningCentre, centre, moments
from m3i_scale.objective.collapse import constant_share


def targets(seed: int, size: int = 8) -> Tensor:
    """Normalised vectors (size, 5, 12) of which most is one constant."""
    generator = torch.Generator().manual_seed(seed)
    constant = torch.randn(12, generator=torch.Generator().manual_seed(0))
    rows = constant + 0.8 * torch.randn(size, 5, 12, generator=generator)
    return torch.nn.functional.layer_norm(rows, (12,))


def by_hand(rows: Tensor) -> Tensor:
    wide = rows.double()
    moved = wide - wide.mean((0, 1))
    return (moved / moved.square().mean().sqrt()).float()


def test_a_batch_loses_the_mean_of_each_channel_and_keeps_unit_mean_square():
    rows = targets(1)
    found = centre(rows, moments(rows))
    torch.testing.assert_close(found, by_hand(rows), rtol=1e-6, atol=2e-6)
    assert found.mean((0, 1)).abs().max() < 1e-6
    assert found.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_the_constant_share_is_what_centring_takes_away():
    rows = targets(1)
    mean = rows.double().mean((0, 1))
    expected = (mean.square().sum() / rows.double().square().sum(-1).mean()).item()
    assert constant_share(rows).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5
    assert constant_share(centre(rows, moments(rows))) < 1e-6
    assert constant_share(torch.ones(3, 2, 4)).item() == pytest.approx(1)


def test_equal_targets_become_zero_and_not_noise():
    rows = targets(1)[:1, :1].expand(8, 5, 12)
    assert centre(rows, moments(rows)).abs().max() < 1e-2


def test_running_averages_take_in_batches_in_training_only():
    part = RunningCentre(12, decay=0.9)
    part.eval()
    torch.testing.assert_close(part(targets(1)), by_hand(targets(1)), rtol=1e-6, atol=2e-6)
    part.train()
    for seed in (1, 2, 3):
        found = part(targets(seed))
    weights = torch.tensor([0.81, 0.9, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    batches = torch.stack([targets(seed).double() for seed in (1, 2, 3)])
    mean = (weights[:, None] * batches.mean((1, 2))).sum(0)
    square = (weights * batches.square().mean((1, 2, 3))).sum()
    expected = (batches[-1] - mean) / (square - mean.square().mean()).sqrt()
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=2e-6)
    before = part.averages.clone()
    part.eval()(targets(4))
    assert torch.equal(part.averages, before)


def test_a_batch_that_is_not_finite_is_left_out():
    part = RunningCentre(12, decay=0.9)
    part(targets(1))
    before = part.averages.clone()
    part(targets(2).masked_fill(torch.rand(8, 5, 12) < 0.1, float("nan")))
    assert torch.equal(part.averages, before)


def test_averages_stay_in_float32_where_networks_do_not():
    part = RunningCentre(12, decay=0.9)
    part(targets(1))
    before = part.averages.clone()
    part.bfloat16()
    assert torch.equal(part.averages, before)
    assert part.averages.dtype == torch.float32


def two_batches(world: Any, folder: Path) -> dict[str, Tensor]:
    """This rank's half of two batches, centred by the batch and by averages."""
    part, half = RunningCentre(12, decay=0.9), slice(4 * world.rank, 4 * world.rank + 4)
    for seed in (1, 2):
        own = targets(seed)[half]
        found = {"batch": centre(own, moments(own)), "running": part(own)}
    return found | {"averages": part.averages}


@pytest.mark.distributed
def test_two_ranks_give_what_one_gives(tmp_path: Path):
    ranks = run_ranks(2, two_batches, tmp_path)
    part = RunningCentre(12, decay=0.9)
    for seed in (1, 2):
        whole = targets(seed)
        expected = {"batch": centre(whole, moments(whole)), "running": part(whole)}
    for kind, value in expected.items():
        found = torch.cat([rank[kind] for rank in ranks])
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    assert torch.equal(ranks[0]["averages"], ranks[1]["averages"])
