"""Signals that come twice, and launchers that die: what is saved must not be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3i_scale.engine import processes

STOPPING = """
import sys, time
from m3i_scale.engine.stop import StopFlag
flag = StopFlag(patience=float(sys.argv[1]))
print("ready", flush=True)
while flag.raised_by is None:
    time.sleep(0.01)
print("asked by", flag.raised_by, flush=True)
time.sleep(float(sys.argv[2]))
print("saved", flush=True)
"""

# Starts its arguments and waits for them, as a launcher does.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen(sys.argv[1:]).wait())
"""


def start(*words: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM),
     (signal.SIGUSR1, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1)],
)  # fmt: skip
def test_a_repetition_at_once_does_not_lose_the_save(first, second):
    child = start(sys.executable, "-c", STOPPING, "5", "0.5")
    child.send_signal(first)
    child.send_signal(second)
    out, _ = child.communicate(timeout=30)
    assert out == f"asked by {first.name}\nsaved\n"
    assert child.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_later_signal_ends_at_once(number):
    child = start(sys.executable, "-c", STOPPING, "0.2", "60")
    child.send_signal(number)
    time.sleep(0.6)
    child.send_signal(number)
    assert child.wait(20) == -number


@pytest.mark.parametrize("names", [["deepspeed"], ["torchrun"], ["wrapper", "deepspeed"],
                                   ["deepspeed", "launch"]])  # fmt: skip
def test_the_death_of_a_launcher_asks_its_ranks_to_stop(tmp_path: Path, names: list[str]):
    """Whichever of the processes above the rank it is, and though nothing tells the rank."""
    command = [sys.executable, "-c", STOPPING, "5", "0"]
    for name in reversed(names):
        (tmp_path / name).write_text(LAUNCHER)
        command = [sys.executable, str(tmp_path / name), *command]
    top = start(*command)
    victim = top.pid if names[0] != "wrapper" else _child(top.pid)
    os.kill(victim, signal.SIGKILL)
    assert top.stdout is not None
    assert top.stdout.readline() == "asked by the end of its launcher\n"
    top.wait(20)


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_the_death_of_a_shell_does_not(tmp_path: Path):
    """nohup train.py &, and log out."""
    (tmp_path / "shell").write_text(LAUNCHER)
    top = start(sys.executable, str(tmp_path / "shell"), sys.executable, "-c", STOPPING, "5", "0")
    child = _child(top.pid)
    top.kill()
    top.wait()
    time.sleep(2.5)
    assert processes.is_running(child, None)
    os.kill(child, signal.SIGTERM)
    assert top.stdout is not None
    assert top.stdout.readline() == "asked by SIGTERM\n"


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    born = processes.start_time(os.getpid())
    assert processes.is_running(os.getpid(), born)
    assert not processes.is_running(os.getpid(), (born or 0) + 1)
    assert not processes.is_running(2**22 + 1, None)
