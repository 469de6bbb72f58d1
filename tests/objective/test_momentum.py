from __future__ import annotations

import math

import pytest

from m3i_scale.objective.momentum import ema_coefficient, momentum_by_length, turnovers


def test_cosine_from_start_to_one():
    total = 100
    values = [ema_coefficient(step, total, 0.995, 1.0) for step in range(total + 1)]
    assert values[0] == pytest.approx(0.995)
    assert values[-1] == pytest.approx(1.0)
    assert values == sorted(values)
    assert values[25] == pytest.approx(1 - 0.005 * (math.cos(math.pi / 4) + 1) / 2)


def test_beyond_the_end_it_stays():
    assert ema_coefficient(500, 100, 0.9, 0.99) == pytest.approx(0.99)


@pytest.mark.parametrize(("total", "start", "final"), [(650, 0.9995, 1.0), (400, 0.95, 0.99)])
def test_how_often_the_start_is_forgotten(total: int, start: float, final: float):
    times, remaining = turnovers(total, start, final)
    # A weight that starts at 1 and follows a student at 0 is what remains of the start.
    average = 1.0
    for step in range(total):
        average *= ema_coefficient(step, total, start, final)
    assert remaining == pytest.approx(average)
    assert times == pytest.approx(total * (2 - start - final) / 2, rel=0.01)


@pytest.mark.parametrize("total", [50, 400, 650, 331_500])
@pytest.mark.parametrize("final", [1.0, 0.9999])
def test_momentum_by_length_forgets_between_five_and_ten_times(total: int, final: float):
    start = momentum_by_length(total, final)
    times, remaining = turnovers(total, start, final)
    assert 0 < start <= 1 or total * (1 - final) > 7
    assert 5 < times < 10 or total * (1 - final) > 7
    assert remaining < 0.01


def test_a_run_of_a_few_steps_cannot_forget_so_often():
    assert momentum_by_length(6, 1.0) == 0
