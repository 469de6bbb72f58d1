"""Who may train in a run folder: one start at a time, whatever machine it is on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from m3i_scale.config import ConfigError
from m3i_scale.engine import lock, processes
from m3i_scale.engine.lock import LOST, RunLock

HOLD = """
import pathlib, sys, time
from m3i_scale.engine.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1]), beat=0.1, stale=1.0):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0.3)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def quick(folder: Path) -> RunLock:
    return RunLock(folder, beat=0.1, stale=1.0)


def start_holder(folder: Path, **variables: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leave(folder: Path, **changes: Any) -> None:
    """A lock whose owner is gone."""
    held = quick(folder)
    held._create()
    rewrite(folder, token="other", **changes)


def test_it_is_released(tmp_path):
    with quick(tmp_path / "run"):
        assert (tmp_path / "run" / "lock.json").is_file()
    assert list((tmp_path / "run").iterdir()) == []


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), quick(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_is_refused_by_name_at_once(tmp_path):
    holder = start_holder(tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"process {holder.pid} on .* trains there"):
            quick(tmp_path).__enter__()
        assert time.monotonic() - started < 0.9
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_owner_is_succeeded_at_once(tmp_path):
    holder = start_holder(tmp_path)
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - started < 0.9


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    """Process ids are used again."""
    leave(tmp_path, born=1)
    with quick(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_that_beats_is_alive(tmp_path, monkeypatch):
    holder = start_holder(tmp_path)
    try:
        monkeypatch.setattr(processes, "machine", lambda: "another boot")
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            quick(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()


def test_an_owner_on_another_machine_that_is_silent_is_dead(tmp_path):
    leave(tmp_path, host="elsewhere")
    started = time.monotonic()
    with quick(tmp_path):
        assert 1.0 <= time.monotonic() - started < 5.0


def test_a_restarted_job_takes_its_own_lock_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leave(tmp_path, host="elsewhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - started < 0.9


def test_another_job_does_not(tmp_path, monkeypatch):
    holder = start_holder(tmp_path, SLURM_JOB_ID="7")
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(ConfigError, match="job 7"):
            quick(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()


def test_an_owner_taken_for_dead_ends_when_it_comes_back(tmp_path):
    holder = start_holder(tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    rewrite(tmp_path, host="elsewhere")
    try:
        with quick(tmp_path):
            os.kill(holder.pid, signal.SIGCONT)
            _, said = holder.communicate(timeout=20)
            assert holder.returncode == LOST
            assert "has taken over" in said
            assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}'])
def test_an_unreadable_lock_goes_stale(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with quick(tmp_path):
        pass


def _compete(folder: Path, results: Any, over: Any) -> None:
    lock.SETTLE = 0.3
    try:
        with quick(folder):
            results.put(os.getpid())
            over.wait(60)
    except ConfigError:
        results.put(0)


@pytest.mark.parametrize("dead_owner", [False, True])
def test_of_many_that_start_at_once_one_has_it(tmp_path, dead_owner):
    if dead_owner:
        leave(tmp_path, pid=2**22 + 1)
    context = multiprocessing.get_context("fork")
    results, over = context.Queue(), context.Event()
    started = [context.Process(target=_compete, args=(tmp_path, results, over)) for _ in range(8)]
    for process in started:
        process.start()
    found = [results.get(timeout=30) for _ in started]
    over.set()
    for process in started:
        process.join()
    assert sum(pid > 0 for pid in found) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        quick(tmp_path / "file" / "run").__enter__()
