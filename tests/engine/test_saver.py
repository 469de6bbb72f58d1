"""What is gone back to: the newest checkpoint that is whole, and what is said of the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import write
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.engine import checkpoint
from m3i_scale.engine.checkpoint import CheckpointError
from m3i_scale.engine.saver import Saver, newest_good

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log records, whether or not a test before has made the logger speak elsewhere."""
    logger = logging.getLogger("m3i_scale")
    logger.handlers[:], logger.propagate = [], True
    caplog.set_level(logging.INFO, "m3i_scale")
    return caplog


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


TENSORS = checkpoint.rank_file(1, 2)


@pytest.mark.parametrize("name", [TENSORS, "state.json", "complete.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, heard, damage, name):
    before, newest = write(tmp_path, 1, 2), write(tmp_path, 2, 2)
    damage(newest / name)
    found = newest_good(tmp_path, "auto", ALONE)
    assert found is not None
    assert found.path == before
    assert str(newest) in heard.text
    assert "passed over" in heard.text


def test_when_all_are_damaged_nothing_begins_anew_unasked(tmp_path):
    """A file system that fails must not cost a run of weeks."""
    flip(write(tmp_path, 1, 2) / TENSORS)
    flip(write(tmp_path, 2, 2) / TENSORS)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* --resume never"):
        newest_good(tmp_path, "auto", ALONE)
    assert newest_good(tmp_path, "never", ALONE) is None


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
    path = write(tmp_path, 1, 2)
    cut(path / TENSORS)
    with pytest.raises(ConfigError, match="is damaged; choose another one"):
        newest_good(tmp_path, str(path), ALONE)


def test_what_a_crash_left_is_told_and_swept_away_by_the_next_start(tmp_path, heard):
    good = write(tmp_path, 1, 2)
    half = tmp_path / "step-00000002.partial"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half of it")
    saver = Saver(tmp_path, ALONE, keep_last=1, keep_every=None, background=True)
    newest_good(tmp_path, "auto", ALONE)
    assert f"{half} was never completed and is passed over" in heard.text
    assert half.exists()  # looking alone changes nothing
    saver.remove_leftovers()
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_is_told_at_the_end_and_forgotten_after_a_success(tmp_path, heard, background):
    saver = Saver(tmp_path, ALONE, keep_last=2, keep_every=None, background=background)
    state = {"ranks": 1, "shapes": {}}
    (tmp_path / "step-00000001.partial").mkdir()
    # The name of a file that is to be written leads to a device that is always full.
    (tmp_path / "step-00000001.partial" / "state.json").symlink_to("/dev/full")
    saver.save(1, {"x": torch.ones(9)}, state)
    assert not saver.finish()
    assert "No space left on device" in heard.text
    assert "the last good checkpoint is none" in heard.text
    assert list(tmp_path.iterdir()) == []
    saver.save(2, {"x": torch.ones(9)}, state)
    assert saver.finish()
    assert saver.last_good == tmp_path / "step-00000002"
