"""What an attempt says of itself in its run folder, by whichever rank can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import write
from m3i_scale.cluster.launch import World
from m3i_scale.engine import checkpoint
from m3i_scale.engine.communication import Recorder
from m3i_scale.engine.events import EventLog, Start
from m3i_scale.engine.saver import Saver, newest_good

ALONE = World(0, 0, 1, torch.device("cpu"))


def log_of(folder: Path, rank: int = 0) -> EventLog:
    return EventLog(folder, rank, "a", ["n0", "n1"], Start({}))


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_rank_says_that_it_has_stalled(tmp_path: Path):
    """Rank 0 may be the one that is frozen."""
    for rank in (0, 1):
        events = log_of(tmp_path, rank)
        with events:
            events.start()
            events.stalled("no step for 3 s")
    names = ("events.jsonl", "events-rank-00001.jsonl")
    for name in names:
        found = [one for one in told(tmp_path / name) if one["event"] == "stalled"]
        assert [one["words"] for one in found] == ["no step for 3 s"], name


def test_a_damaged_checkpoint_and_one_that_could_not_be_written_are_recorded(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, 1, 1)
    damaged = write(folder, 2, 1)
    (damaged / "state.json").write_text("{}")
    with log_of(tmp_path) as events:
        found = newest_good(folder, "auto", ALONE, events.passed_over)
        assert found is not None
        assert not told(tmp_path / "events.jsonl")  # a start that is refused writes nothing
        events.start()
        saver = Saver(folder, ALONE, keep_last=2, keep_every=None, background=False)
        saver.on_failure = events.unsaved
        (folder / "step-00000003.partial").mkdir()
        (folder / "step-00000003.partial" / "state.json").symlink_to("/dev/full")
        saver.save(3, {"x": torch.ones(9)}, {"ranks": 1, "shapes": {}})
    start, passed, unsaved, end = told(tmp_path / "events.jsonl")
    assert (start["event"], end["event"]) == ("start", "end")
    assert (passed["event"], passed["step"]) == ("passed over", 2)
    assert "state.json does not match its checksum" in passed["words"]
    assert (unsaved["event"], unsaved["step"]) == ("unsaved", 3)
    assert "No space left on device" in unsaved["words"]
    assert checkpoint.complete_checkpoints(folder)[-1] == damaged


def test_a_request_to_stop_is_recorded_when_it_is_heard(tmp_path: Path):
    with log_of(tmp_path) as events:
        events.start()
        events.asked(7, "SIGTERM")
        assert told(tmp_path / "events.jsonl")[-1]["event"] == "asked"  # it may be killed now
    end = told(tmp_path / "events.jsonl")[-1]
    assert (end["event"], end["cause"], end["words"]) == ("end", "stopped", "SIGTERM")


@pytest.mark.parametrize("waiting", [False, True])
def test_a_crash_says_in_which_collective_it_came(tmp_path: Path, waiting: bool):
    recorder, tensor = Recorder(), torch.ones(9)

    def lost(*_: Any) -> Any:
        raise RuntimeError("closed by peer")

    class Work:
        wait = lost

    def work(*_: Any) -> Any:
        return Work() if waiting else lost()

    def train() -> None:
        with log_of(tmp_path) as events:
            events.start()
            handle = recorder.call("all_reduce", work, (tensor,), {})
            handle.wait()

    with pytest.raises(RuntimeError, match="closed by peer"):
        train()
    end = told(tmp_path / "events.jsonl")[-1]
    assert (end["cause"], end["words"]) == ("crashed", "RuntimeError: closed by peer")
    assert end["collective"].startswith("all_reduce of 9 float32, number 0")


def test_a_crash_elsewhere_names_no_collective(tmp_path: Path):
    def train() -> None:
        with log_of(tmp_path) as events:
            events.start()
            raise KeyError("x")

    with pytest.raises(KeyError):
        train()
    assert "collective" not in told(tmp_path / "events.jsonl")[-1]
