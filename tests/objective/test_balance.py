from __future__ import annotations

import pytest
import torch

from m3i_scale.config import Balance
from m3i_scale.objective.balance import GradientProbe, LossBalance


def test_lambda_is_one_until_both_norms_are_known():
    balance = LossBalance(Balance(gamma=2.0))
    assert balance.supervised_weight == 1.0
    balance.update(3.0, 0.0)
    assert balance.supervised_weight == 1.0
    balance.update(3.0, 1.5)
    assert balance.supervised_weight == pytest.approx(2.0 * 3.0 / 1.5)


def test_norms_are_moving_averages():
    balance = LossBalance(Balance(decay=0.75))
    balance.update(4.0, 1.0)
    balance.update(8.0, 3.0)
    assert balance.supervised_weight == pytest.approx((3 + 2) / (0.75 + 0.75))


def test_what_is_not_finite_is_left_out():
    balance = LossBalance(Balance())
    balance.update(4.0, 2.0)
    balance.update(float("nan"), float("inf"))
    assert balance.supervised_weight == 2.0


def test_state_travels():
    balance, other = LossBalance(Balance()), LossBalance(Balance())
    balance.update(4.0, 2.0)
    other.load_state_dict(balance.state_dict())
    assert other.supervised_weight == balance.supervised_weight


def test_inactive_is_always_one():
    balance = LossBalance(None)
    balance.update(4.0, 2.0)
    assert balance.supervised_weight == 1.0


@pytest.mark.parametrize("factor", [1.0, 0.25, 1024.0])
def test_probe_measures_what_each_loss_alone_sends_back(factor: float):
    torch.manual_seed(0)
    leaf = torch.randn(5, 7, requires_grad=True)
    probe, weight = GradientProbe(), 0.3
    features = leaf * 2
    ssp, sp = probe.split(features)
    loss = ssp.pow(3).sum() + weight * sp.sin().sum()
    probe.watch_total(loss)
    (loss * factor).backward()
    z = (leaf * 2).detach()
    expected = torch.stack([(3 * z**2).square().sum(), z.cos().square().sum()])
    torch.testing.assert_close(probe.squares(weight), expected)
    torch.testing.assert_close(leaf.grad, factor * 2 * (3 * z**2 + weight * z.cos()))


def test_probe_of_one_loss_only():
    leaf = torch.ones(3, requires_grad=True)
    probe = GradientProbe()
    ssp, _ = probe.split(leaf * 1)
    loss = ssp.sum()
    probe.watch_total(loss)
    loss.backward()
    assert probe.squares(1.0).tolist() == [3.0, 0.0]


def test_probe_before_any_backward_pass_says_so():
    with pytest.raises(RuntimeError, match="no backward pass"):
        GradientProbe().squares(1.0)


def test_lambda_stays_below_its_bound():
    balance = LossBalance(Balance(maximum=20.0))
    balance.update(4.0, 1e-3)
    assert balance.supervised_weight == 20.0
    balance.g_sp = 1.0
    assert balance.supervised_weight == 4.0
