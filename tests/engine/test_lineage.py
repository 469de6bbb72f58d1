"""Which checkpoints are the run: after beginning anew, going back, damage, and interruptions."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import SHAPES
from helpers.checkpoints import write as write_checkpoint
from m3i_scale.cluster.launch import World
from m3i_scale.engine import checkpoint, lineage, run_folder
from m3i_scale.engine.saver import Saver, newest_good

ALONE = World(0, 0, 1, torch.device("cpu"))


class Run:
    """A run folder and what training does to its checkpoints."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.saver = Saver(
            self.checkpoints, ALONE, keep_last=keep_last, keep_every=None, background=False
        )

    def train(self, steps: int, resume: str = "auto") -> int:
        """Start as `session.open_run` does, save every step; the step that it started from."""
        reader = newest_good(self.checkpoints, resume, ALONE)
        first = reader.state["step"] if reader else 0
        self.saver.lineage = run_folder.begin(self.folder, reader and reader.path, first)
        for step in range(first + 1, first + steps + 1):
            state = {"ranks": 1, "shapes": SHAPES, "step": step}
            self.saver.save(step, {"x": torch.ones(1)}, state)
            self.curve(step - 1)
        return first

    def curve(self, step: int) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "run": str(self.saver.lineage.run)}) + "\n")

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step_of(p) for p in checkpoint.complete_checkpoints(self.checkpoints)]

    @property
    def aside(self) -> list[Path]:
        return sorted((self.folder / "set-aside").glob("*/checkpoints/step-*"))

    def metrics(self) -> list[int]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]


def path(run: Run, step: int) -> str:
    return str(checkpoint.step_folder(run.checkpoints, step))


def test_a_fresh_start_in_a_used_folder_keeps_both(tmp_path):
    Run(tmp_path).train(6)
    again = Run(tmp_path)
    assert again.train(1, "never") == 0
    assert again.steps == [1]  # not removed as the oldest of all, the moment it was written
    assert [p.name for p in again.aside] == ["step-00000005", "step-00000006"]
    assert all(checkpoint.verify(p) is None for p in again.aside)
    assert again.metrics() == [0]
    assert Run(tmp_path).train(2) == 1
    assert again.steps == [2, 3]


def test_after_going_back_the_new_branch_goes_on(tmp_path):
    Run(tmp_path, keep_last=3).train(6)
    back = Run(tmp_path, keep_last=3)
    assert back.train(1, path(back, 4)) == 4
    assert back.steps == [4, 5]
    assert [p.name for p in back.aside] == ["step-00000005", "step-00000006"]
    assert back.metrics() == [0, 1, 2, 3, 4]
    assert Run(tmp_path, keep_last=3).train(2) == 5
    assert back.steps == [5, 6, 7]


def test_what_is_set_aside_is_a_run_that_can_be_gone_back_to(tmp_path):
    run = Run(tmp_path)
    run.train(6)
    (tmp_path / "config.yaml").write_text("run: old\n")
    run.train(1, "never")
    aside = run.aside[0].parents[1]
    assert (aside / "config.yaml").read_text() == "run: old\n"
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 6
    assert Run(tmp_path).train(1, str(aside)) == 6
    assert run.steps == [7]


@pytest.mark.parametrize("resume", ["never", "back"])
def test_a_start_that_dies_before_its_first_save_has_decided(tmp_path, resume):
    run = Run(tmp_path, keep_last=9)
    run.train(6)
    run.train(0, path(run, 4) if resume == "back" else "never")
    assert run.steps == ([1, 2, 3, 4] if resume == "back" else [])
    assert run.train(1) == (4 if resume == "back" else 0)


def test_a_start_that_dies_while_it_sets_aside(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_last=9)
    run.train(6)
    rename, left = os.rename, [1]

    def dying(*names):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        run_folder.begin(tmp_path, Path(path(run, 4)), 4)
    monkeypatch.undo()
    assert run.steps == [1, 2, 3, 4]
    assert run.train(1) == 4
    assert run.steps == [1, 2, 3, 4, 5]
    assert [p.name for p in run.aside] == ["step-00000005", "step-00000006"]


def test_damaged_newer_ones_do_not_cost_what_is_written(tmp_path):
    run = Run(tmp_path, keep_last=3)
    run.train(6)
    for step, name in ((5, "state.json"), (6, "complete.json")):
        (Path(path(run, step)) / name).write_text("{")
    run.saver._keep = (1, None)
    assert run.train(1) == 4
    assert run.steps == [5]
    assert checkpoint.verify(Path(path(run, 5))) is None


def test_checkpoints_from_before_lineages_go_on(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        marker = write_checkpoint(run.checkpoints, step, 1) / "complete.json"
        content = json.loads(marker.read_text())
        del content["lineage"]
        marker.write_text(json.dumps(content))
    assert run.train(1) == 2
    assert run.steps == [2, 3]
    assert not run.aside
    assert lineage.read_file(run.checkpoints / lineage.FILE).run  # it has an identity now


def test_a_checkpoint_copied_from_another_run_is_named_and_not_resumed(tmp_path, caplog):
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    run.train(2)
    other.train(5)
    os.rename(path(other, 5), path(run, 5))
    logger = logging.getLogger("m3i_scale")
    logger.handlers[:], logger.propagate = [], True
    assert run.train(1) == 2
    assert f"{path(run, 5)} is of another lineage and is passed over" in caplog.text
    assert [p.name for p in run.aside] == ["step-00000005"]


def test_checkpoints_copied_to_a_new_folder_are_a_run(tmp_path):
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    other.train(5)
    run.checkpoints.mkdir(parents=True)
    os.rename(path(other, 5), path(run, 5))
    assert run.train(1) == 5


def test_another_runs_checkpoint_starts_a_run_with_its_own_identity(tmp_path):
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    other.train(5)
    assert run.train(1, str(other.folder)) == 5
    mine = lineage.of_checkpoint(Path(path(run, 6)))
    assert mine.parent == path(other, 5)
    assert mine.run != lineage.of_checkpoint(Path(path(other, 5))).run


@pytest.mark.parametrize(
    ("job", "restart"), [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
                         ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
)  # fmt: skip
def test_a_restarted_job_does_not_begin_anew_again(tmp_path, monkeypatch, job, restart):
    run = Run(tmp_path)
    run.train(3)
    monkeypatch.setenv(job, "7")
    assert run.train(2, "never") == 0
    monkeypatch.setenv(restart, "1")
    assert run.train(1, "never") == 2
    monkeypatch.setenv(job, "8")  # another submission
    monkeypatch.setenv(restart, "0")
    assert run.train(1, "never") == 0


def test_steps_of_nine_digits_are_ordered_as_numbers(tmp_path):
    run = Run(tmp_path)
    for step in (99_999_999, 100_000_000):
        write_checkpoint(run.checkpoints, step, 1)
    assert run.steps == [99_999_999, 100_000_000]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"attempts": [["x", 1e400]], "run": ""}', "[]"])
def test_a_lineage_of_any_shape_is_none(tmp_path: Path, text: str):
    (tmp_path / "lineage.json").write_text(text)
    assert lineage.read_file(tmp_path / "lineage.json") is None


def test_one_wrong_letter_makes_no_strangers_of_the_checkpoints(tmp_path: Path):
    run = Run(tmp_path)
    run.train(2)
    path = run.checkpoints / lineage.FILE
    line = lineage.read_file(path)
    assert line is not None
    other = "0" if line.attempt[0] != "0" else "1"
    path.write_text(path.read_text().replace(line.attempt, other + line.attempt[1:]))
    assert lineage.read_file(path) is None
    assert run.train(1) == 2  # it goes on, and does not begin anew


def test_a_lineage_without_a_checksum_is_of_an_older_version(tmp_path: Path):
    line = lineage.begin_anew()
    content = {k: v for k, v in line.as_json().items() if k != "check"}
    (tmp_path / "lineage.json").write_text(json.dumps(content))
    assert lineage.read_file(tmp_path / "lineage.json") == line
