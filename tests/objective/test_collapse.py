from __future__ import annotations

import math

import pytest
import torch

from m3i_scale.objective.collapse import SAMPLE, effective_rank, position_share, spread
from m3i_scale.objective.figures import student_figures


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_spread_is_the_deviation_over_samples_with_positions_kept_apart():
    x = torch.randn(7, 5, 3)
    columns = [x[:, m, d].std() for m in range(5) for d in range(3)]
    torch.testing.assert_close(spread(x), torch.stack(columns).mean())
    same_map = torch.randn(1, 5, 3).expand(7, 5, 3)
    assert spread(same_map) < 1e-6


def test_absent_rows_do_not_count():
    x = torch.randn(9, 4)
    present = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    torch.testing.assert_close(spread(x, present), spread(x[present]))
    torch.testing.assert_close(effective_rank(x, present), effective_rank(x[present]))


@pytest.mark.parametrize("shape", [(40, 6), (20, 3, 6)])
def test_effective_rank_is_that_of_the_covariance(shape: tuple[int, ...]):
    x = torch.randn(shape) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.0])
    rows = (x - x.mean(0)).flatten(0, -2)
    eigenvalues = torch.linalg.eigvalsh(rows.T @ rows)
    share = eigenvalues / eigenvalues.sum()
    renyi = -math.log(share.square().sum().item())
    assert effective_rank(x).item() == pytest.approx(math.exp(renyi), rel=1e-4)


def test_effective_rank_between_a_point_a_line_and_all_directions():
    direction = torch.randn(8)
    assert effective_rank(direction.expand(30, 8)) == 0
    line = torch.randn(30, 1) * direction + 7
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.randn(5000, 8)).item() == pytest.approx(8, abs=0.5)


def test_only_a_sample_of_a_large_map_is_looked_at():
    x = torch.randn(64, 196, 16)
    poisoned = x.clone()
    poisoned[:, 1] = float("nan")  # of 196 positions four are looked at
    assert effective_rank(poisoned) == effective_rank(x)
    assert SAMPLE // 64 == 4


def test_position_share_at_both_ends_and_between():
    maps, images = torch.randn(1, 9, 4), torch.randn(6, 1, 4)
    assert position_share(maps.expand(6, 9, 4)).item() == pytest.approx(1)
    assert position_share(images.expand(6, 9, 4)).item() == pytest.approx(0, abs=1e-6)
    assert position_share(torch.ones(6, 9, 4)) == 0
    both = images + maps
    within = both.var(1, unbiased=False).mean()
    between = both.mean(1).var(0, unbiased=False).mean()
    assert position_share(both).item() == pytest.approx((within / (within + between)).item())


def test_the_student_is_judged_by_the_mean_of_the_tokens_of_its_own_image():
    features, seen = torch.randn(20, 9, 4, requires_grad=True), torch.rand(20, 9) < 0.5
    seen[:, 0] = True
    pooled = torch.stack([x[keep].mean(0) for x, keep in zip(features, seen, strict=True)])
    found = student_figures(features, seen)
    wanted = {"student/rank": effective_rank(pooled), "student/spread": spread(pooled)}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], torch.stack([value, torch.ones(())]))
