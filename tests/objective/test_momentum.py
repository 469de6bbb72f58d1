from __future__ import annotations

import math

import pytest

from m3i_scale.objective.momentum import ema_coefficient


def test_cosine_from_start_to_one():
    total = 100
    values = [ema_coefficient(step, total, 0.995, 1.0) for step in range(total + 1)]
    assert values[0] == pytest.approx(0.995)
    assert values[-1] == pytest.approx(1.0)
    assert values == sorted(values)
    assert values[25] == pytest.approx(1 - 0.005 * (math.cos(math.pi / 4) + 1) / 2)


def test_beyond_the_end_it_stays():
    assert ema_coefficient(500, 100, 0.9, 0.99) == pytest.approx(0.99)
