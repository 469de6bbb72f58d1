from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sweeps import finish, make, train
from m3i_scale.config import ConfigError
from m3i_scale.sweep import progress


def test_states(tmp_path: Path):
    sweep, grid = make(tmp_path)
    train(grid[1], 4)
    train(grid[2], 6)
    finish(grid[3], sweep, {"kNN": 0.5})
    assert [progress.state(cell, sweep.evaluation) for cell in grid] == [
        "not begun",
        "interrupted after step 4 of 6",
        "trained, not evaluated",
        "finished",
    ]


def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path):
    _, grid = make(tmp_path)
    partial = grid[0].folder / "checkpoints" / "step-00000006.partial"
    partial.mkdir(parents=True)
    assert progress.trained_steps(grid[0]) == 0
    (partial / "complete.json").write_text("{}")  # a crash just before the folder got its name
    assert progress.trained_steps(grid[0]) == 0


def test_another_evaluation_is_made_again(tmp_path: Path):
    sweep, grid = make(tmp_path)
    finish(grid[0], sweep, {"kNN": 0.5})
    changed = sweep.evaluation.model_copy(update={"neighbours": 7})
    assert progress.is_finished(grid[0], sweep.evaluation)
    assert progress.state(grid[0], changed) == "trained, not evaluated"


def test_a_run_of_another_configuration_is_refused(tmp_path: Path):
    _, grid = make(tmp_path)
    train(grid[0], 4)
    for cell in grid:
        progress.require_unchanged(cell)
    _, changed = make(tmp_path, set=["model.decoder.depth=3"])
    with pytest.raises(ConfigError, match=r"cell 0\.5-seed0 was begun with another model\.deco"):
        progress.require_unchanged(changed[0])
    _, logged = make(tmp_path, set=["logging.every=3"])
    progress.require_unchanged(logged[0])  # has no influence on what is learned
