from __future__ import annotations

import math

import pytest

from m3i_scale.config import ConfigError, Duration, Optimizer
from m3i_scale.engine.schedules import make_schedule, split_batch


def spec(**changes: object) -> Optimizer:
    values = {
        "global_batch_size": 4096,
        "max_micro_batch": 64,
        "duration": "30 epochs",
        "warmup": "1 epoch",
    }
    return Optimizer.model_validate(values | changes)


@pytest.mark.parametrize(
    ("batch", "max_micro", "ranks", "micro", "accumulation"),
    [(64, 32, 2, 32, 1), (64, 32, 1, 32, 2), (40000, 50, 80, 50, 10), (40000, 64, 160, 50, 5)],
)
def test_the_global_batch_is_kept(
    batch: int, max_micro: int, ranks: int, micro: int, accumulation: int
):
    plan = split_batch(batch, max_micro, ranks)
    assert (plan.micro, plan.accumulation) == (micro, accumulation)
    assert plan.micro * plan.accumulation * ranks == batch


def test_an_odd_batch_is_refused():
    with pytest.raises(ConfigError, match="use an even batch"):
        split_batch(63, 8, 1)


def test_a_batch_that_does_not_divide_names_rank_counts_that_do():
    with pytest.raises(ConfigError, match="cannot be spread over 64 ranks") as caught:
        split_batch(40000, 50, 64)
    for count in (50, 80):
        assert str(count) in str(caught.value)
        split_batch(40000, 50, count)


def test_durations_convert_once():
    assert Duration(30, "epochs").steps(batch=40000, epoch_samples=442_000_000) == 331_500
    assert Duration(100, "steps").steps(batch=7, epoch_samples=1) == 100
    assert Duration(1e6, "samples").steps(batch=4096, epoch_samples=1) == math.ceil(1e6 / 4096)


def test_linear_warm_up_then_cosine():
    schedule = make_schedule(spec(final_learning_rate=1e-5), 40960)
    assert (schedule.total, schedule.warmup) == (300, 10)
    rates = [schedule.learning_rate(step) for step in range(301)]
    assert rates[:10] == pytest.approx([1e-3 * (n + 1) / 10 for n in range(10)])
    assert max(rates) == pytest.approx(1e-3)
    assert rates[300] == pytest.approx(1e-5)
    assert rates[155] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match="must be shorter"):
        make_schedule(spec(warmup="30 epochs"), 40960)
