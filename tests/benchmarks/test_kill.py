"""What `kill.py --elastic` takes for rounding, and what it does not."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def kill() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("kill")
    finally:
        sys.path.remove(str(BENCHMARKS))


def write(run: Path, losses: dict[int, float]) -> Path:
    run.mkdir()
    lines = [json.dumps({"step": n, "loss/total": loss}) for n, loss in losses.items()]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def grown(start: float, steps: int = 6) -> dict[int, float]:
    """A loss of 2 with a relative error that triples in each step."""
    return {n: 2.0 * (1 + start * 3**n) for n in range(steps)}


def test_errors_that_grow_alike_are_rounding(kill: Any, tmp_path: Path):
    whole = write(tmp_path / "whole", dict.fromkeys(range(6), 2.0))
    other = write(tmp_path / "other", grown(1e-6))
    run = write(tmp_path / "run", grown(4e-6))
    outcome = kill.compare_within_rounding(run, whole, [other], 10.0)
    assert outcome.passed
    assert not kill.compare_within_rounding(run, whole, [other], 3.0).passed


@pytest.mark.parametrize(
    "change", [{2: 2.02}, {2: math.nan}, {2: None}], ids=["another sample", "nan", "missing"]
)
def test_a_jump_and_a_gap_are_not(kill: Any, tmp_path: Path, change: dict[int, float | None]):
    """The jump is smaller than what rounding comes to in the end."""
    whole = write(tmp_path / "whole", dict.fromkeys(range(12), 2.0))
    other = write(tmp_path / "other", grown(1e-6, 12))
    losses = {n: loss for n, loss in (grown(1e-6, 12) | change).items() if loss is not None}
    outcome = kill.compare_within_rounding(write(tmp_path / "run", losses), whole, [other], 10.0)
    assert not outcome.passed
    assert [words.split(":")[0] for words in outcome.words[1:]] == ["step 2"]
