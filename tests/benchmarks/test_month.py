"""The simulated month: its trace, what a report must say, the scaled ratio, the stand-in srun."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def simulated() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        names = ("trace", "matching", "inject", "slurm", "page")
        return SimpleNamespace(
            **{name: importlib.import_module(f"simulated.{name}") for name in names}
        )
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_month_has_the_published_rates(simulated: Any):
    trace = simulated.trace
    kinds = [kind for kind in trace.KINDS if kind.interrupts]
    published = sum(sum(kind.causes.values()) for kind in kinds)
    assert published == trace.UNEXPECTED + trace.PLANNED  # each cause is in one kind
    counts = trace.a_month()
    month = published * 30 / 54 / 16  # 1,024 of 16,384 GPUs
    # Kinds that would strike less than once a month strike once.
    assert sum(counts[kind.name] for kind in kinds) == pytest.approx(month, abs=3)
    assert all(counts.values())
    drawn = trace.draw(1, seed=5, step_seconds=0.5)
    assert Counter(failure.kind for failure in drawn.failures) == counts
    assert drawn == trace.draw(1, seed=5, step_seconds=0.5)
    assert drawn != trace.draw(1, seed=6, step_seconds=0.5)
    assert len(trace.draw(2, seed=5, step_seconds=0.5).failures) == 2 * len(drawn.failures)


@pytest.mark.parametrize("hours", [0.02, 0.3, 1.0, 2.5])
def test_failures_come_one_after_the_other_and_the_run_outlasts_them(simulated: Any, hours: float):
    month = simulated.trace.draw(hours, seed=1, step_seconds=0.5)
    steps = [failure.step for failure in month.failures]
    assert steps == sorted(set(steps))
    assert 0 < steps[0] <= steps[-1] < month.steps
    assert {failure.rank for failure in month.failures} <= {0, 1}


@pytest.mark.parametrize("minutes", [0.0, 3.0, 15.0, 16.0, 40.0, 1333.3])
def test_whole_checkpoint_intervals_are_left_out(simulated: Any, minutes: float):
    trace = simulated.trace
    played = trace.played_gap(minutes)
    assert played <= min(minutes, trace.SHORTEST_GAP + trace.CHECKPOINT_MINUTES)
    left_out = (minutes - played) / trace.CHECKPOINT_MINUTES
    assert left_out == pytest.approx(round(left_out), abs=1e-9)


def test_costs_are_scaled_and_the_rest_trains_as_well_as_here(simulated: Any):
    shares = {"training": 906.0, "data": 9.0, "checkpoint": 7.0, "other": 2.0, "start_up": 60.0,
              "lost": 20.0, "stalls": 30.0, "queueing": 4.0, "down": 0.0}  # fmt: skip
    report = {
        "shares": shares,
        "effective_ratio": 0.88,
        "attempts": [0, 0, 0],
        "steps": {"last": 1829},
        "slow_spells": [{"delay": 6.0}],
    }
    found = simulated.matching.effective_ratio(report, minutes=12_000.0)
    assert found["steady"] == pytest.approx(909 / 918)
    assert found["lost_minutes"] == pytest.approx(60)
    assert found["step_seconds"] == pytest.approx(0.5)
    assert found["ratio"] == pytest.approx(909 / 918 * 0.995)
    assert found["without_data"] == pytest.approx(900 / 918 * 0.995)
    # Three attempts were two interruptions of 30 min; each GPU adds their rate.
    rate = (419 + 47) / 54 / 16_384 * found["minutes"] / 1440
    gpus = (1 - 0.97 / found["steady"]) / (30 / found["minutes"]) / rate
    assert found["most_gpus"] == pytest.approx(gpus, abs=1)


SILENT = "no rank said a word"
EXPLAINED = [
    ("rank dies", "killed", "rank 1 (vm) ended without a word; srun: task 1: Killed; rank 0 in x"),
    ("rank crashes", "killed", "rank 1 (vm) ended without a word; srun: task 1: Segmentation"),
    ("loader hangs", "stalled", "rank 1 has made no step for 30 s; it is in no collective; the"),
    ("rank stalls", "stalled", "rank 0 has made no step for 30 s; rank 1 (vm) said nothing"),
    ("node dies", "killed", SILENT),
    ("preempted at once", "killed", f"{SILENT}; srun: task 0: Killed"),
    ("preempted at once", "killed", "asked to stop by SIGTERM, and killed before it had saved"),
    ("preempted at once", "stopped", "SIGTERM"),
    ("preempted with grace", "stopped", "SIGUSR1"),
]  # fmt: skip


def injected(simulated: Any, kind: str, **told: Any) -> Any:
    return simulated.inject.Injected(1, kind, 100.0, 4, 1, 50, 1000.0, 1010.0, told)


def report_of(cause: str, words: str, **others: Any) -> dict[str, Any]:
    attempts = [
        {"restart": 3, "cause": "stopped", "words": "SIGTERM"},
        {"restart": 4, "cause": cause, "words": words},
    ]
    return {"attempts": attempts, "checkpoint_faults": [], "slow_spells": [], **others}


@pytest.mark.parametrize(("kind", "cause", "words"), EXPLAINED)
def test_a_failure_is_explained_by_its_own_cause_only(simulated: Any, kind, cause, words):
    done = injected(simulated, kind)
    (right,) = simulated.matching.match(report_of(cause, words), [done])
    assert right.explained
    for other, *said in EXPLAINED:
        same = {kind, other} <= {"node dies", "preempted at once"}
        if other != kind and not same:
            (wrong,) = simulated.matching.match(report_of(*said), [done])
            assert not wrong.explained, (kind, other)
    (wrong,) = simulated.matching.match(report_of("crashed", "KeyError: x"), [done])
    assert not wrong.explained
    elsewhere = report_of(cause, words)
    elsewhere["attempts"][1]["restart"] = 5
    (wrong,) = simulated.matching.match(elsewhere, [done])
    assert not wrong.explained


def test_another_victim_is_no_explanation(simulated: Any):
    words = "rank 0 (vm) ended without a word; srun: task 0: Killed; rank 1 in x"
    (wrong,) = simulated.matching.match(
        report_of("killed", words), [injected(simulated, "rank dies")]
    )
    assert not wrong.explained


def test_damage_a_full_disk_and_a_slow_rank_are_looked_up_where_they_belong(simulated: Any):
    match = simulated.matching.match
    passed = {"what": "passed over", "step": 40, "time": 1020.0, "attempt": 3, "words": "x"}
    damaged = injected(simulated, "checkpoint damaged", damaged_step=40)
    for fault, good in ((passed, True), (passed | {"step": 30}, False), (None, False)):
        faults = [fault] if fault else []
        (found,) = match(report_of("killed", SILENT, checkpoint_faults=faults), [damaged])
        assert found.explained == good
    unsaved = {"what": "not written", "step": 60, "time": 1005.0, "attempt": 2,
               "words": "rank 0: No space left on device"}  # fmt: skip
    full = injected(simulated, "disk full", unsaved_steps=[60])
    for fault, good in ((unsaved, True), (unsaved | {"words": "rank 0: I/O error"}, False)):
        (found,) = match(report_of("finished", "", checkpoint_faults=[fault]), [full])
        assert found.explained == good
    spell = {"attempt": 2, "rank": 1, "begin": 1002.0, "end": 1009.0, "first_step": 51,
             "last_step": 59, "delay": 4.0}  # fmt: skip
    slow = injected(simulated, "rank slow")
    for one, good in ((spell, True), (spell | {"rank": 0}, False), (spell | {"end": 999.0}, False)):
        (found,) = match(report_of("finished", "", slow_spells=[one]), [slow])
        assert found.explained == good


def test_an_end_that_nobody_has_caused_is_unexpected(simulated: Any):
    report = report_of("killed", "x")
    found = simulated.matching.unexpected(report, [injected(simulated, "rank dies")])
    assert found == ["restart 3 ended without a failure: stopped: SIGTERM"]


def run_tasks(folder: Path, script: str) -> tuple[int, str, list[str]]:
    environment = os.environ | {
        "SIMULATED_SLURM": str(folder), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    command = [sys.executable, "-S", "-E", str(ROOT / "benchmarks" / "simulated" / "srun.py")]
    done = subprocess.run(
        [*command, "--wait=60", f"--output={folder}/rank-%4t.log", "bash", "-c", script],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    logs = [(folder / f"rank-000{n}.log").read_text().strip() for n in range(2)]
    return done.returncode, done.stderr, logs


def test_the_stand_in_says_what_srun_says(simulated: Any, tmp_path: Path):
    assert run_tasks(tmp_path, "echo $SLURM_PROCID") == (0, "", ["0", "1"])
    assert len(json.loads((tmp_path / "tasks.json").read_text())) == 3
    code, said, _ = run_tasks(tmp_path, "((SLURM_PROCID)) && kill -9 $$; sleep 0.3; exit 1")
    assert code == 128 + signal.SIGKILL
    assert said.splitlines() == [
        "srun: error: n1: task 1: Killed", "srun: error: n1: task 0: Exited with exit code 1",
    ]  # fmt: skip


def test_a_byte_of_the_disk_is_left_for_lines(simulated: Any, tmp_path: Path, monkeypatch):
    state = SimpleNamespace(f_bavail=700, f_frsize=4096)
    monkeypatch.setattr(simulated.inject.os, "statvfs", lambda _: state)
    simulated.inject.fill(tmp_path / "filler")
    assert (tmp_path / "filler").stat().st_size == 700 * 4096 - simulated.inject.ROOM
