"""What a failure does to a running attempt, from outside: signals, and bytes on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forks import wait_for

from simulated.slurm import Job
from simulated.trace import KILL_WAIT_MINUTES, SCALE, Failure

PATIENCE = 300.0  # seconds for what takes a few
GRACE = 30.0  # seconds for saving, if the job is asked to stop
ROOM = 256 << 10  # bytes that a full disk leaves for lines, and not for a checkpoint
SLOW_SECONDS, DUTY = 15.0, 0.1  # of a slow rank: how long; how long it stands and goes, in turns


@dataclass
class Injected:
    """What was done, when, and to whom."""

    number: int
    kind: str
    minute: float  # of the month
    restart: int  # of the job
    rank: int
    step: int  # that was made when it began
    begin: float
    end: float
    told: dict[str, Any] = field(default_factory=dict)  # what else is known of it

    def as_json(self) -> dict[str, Any]:
        """A line of the record."""
        return asdict(self)


def inject(
    failure: Failure, job: Job, step_seconds: float, progress: Callable[[], int]
) -> Injected:
    """Have a failure strike; returns when that is over, the attempt perhaps not.

    Args:
        failure: which.
        job: its attempt must be training.
        step_seconds: of a usual step.
        progress: how many steps have been made.
    """
    if failure.kind == "rank crashes":
        wait_for(lambda: half_written(job.run) or job.code is not None, PATIENCE)
        time.sleep(0.05 * failure.draw)
    else:
        time.sleep(step_seconds * failure.draw)
    done = Injected(
        failure.number, failure.kind, failure.minute, job.restart, failure.rank, progress(),
        time.time(), 0.0,
    )  # fmt: skip
    ACTIONS[failure.kind](failure, job, done)
    done.end = time.time()
    return done


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _rank_dies(failure: Failure, job: Job, _: Injected) -> None:
    _send([job.tasks()[failure.rank]], signal.SIGKILL)


def _rank_crashes(failure: Failure, job: Job, done: Injected) -> None:
    done.told["half_written"] = half_written(job.run)
    _send([job.tasks()[failure.rank]], signal.SIGSEGV)


def _loader_hangs(failure: Failure, job: Job, _: Injected) -> None:
    _send(list(workers(job.tasks()[failure.rank])), signal.SIGSTOP)


def _rank_stalls(failure: Failure, job: Job, _: Injected) -> None:
    _send([job.tasks()[failure.rank]], signal.SIGSTOP)


def _node_dies(_: Failure, job: Job, __: Injected) -> None:
    job.mark("NODE_FAIL")  # Slurm requeues it, and not the script
    tasks = job.tasks()
    _send([job.launcher(), *tasks], signal.SIGKILL)
    for pid in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # data workers


def _preempted_at_once(_: Failure, job: Job, __: Injected) -> None:
    job.mark("COMPLETING")
    _send(job.tasks(), signal.SIGTERM)
    time.sleep(KILL_WAIT_MINUTES / SCALE)
    _send(job.tasks(), signal.SIGKILL)


def _preempted_with_grace(_: Failure, job: Job, __: Injected) -> None:
    _send(job.tasks(), signal.SIGUSR1)
    if not wait_for(lambda: job.code is not None, GRACE):
        _send(job.tasks(), signal.SIGKILL)


def _checkpoint_damaged(failure: Failure, job: Job, done: Injected) -> None:
    _node_dies(failure, job, done)
    wait_for(lambda: job.code is not None, PATIENCE)
    from m3i_scale.engine import checkpoint

    newest = checkpoint.complete_checkpoints(job.run / "checkpoints")[-1]
    files = sorted(newest.glob("*.safetensors"))
    victim = files[failure.rank % len(files)]
    with victim.open("rb+") as file:
        place = int(failure.draw * victim.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))
    done.told |= {"damaged_step": checkpoint.step_of(newest), "file": victim.name, "byte": place}


def _disk_full(_: Failure, job: Job, done: Injected) -> None:
    before = len(unsaved(job.run))
    filler = job.run.parent / "filler"
    try:
        fill(filler)
        wait_for(lambda: len(unsaved(job.run)) > before or job.code is not None, PATIENCE)
    finally:
        filler.unlink(missing_ok=True)
    done.told["unsaved_steps"] = unsaved(job.run)[before:]


def _rank_slow(failure: Failure, job: Job, _: Injected) -> None:
    pid, end = [job.tasks()[failure.rank]], time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end and job.code is None:
        _send(pid, signal.SIGSTOP)
        time.sleep(DUTY)
        _send(pid, signal.SIGCONT)
        time.sleep(DUTY)


ACTIONS: dict[str, Callable[[Failure, Job, Injected], None]] = {
    "rank dies": _rank_dies,
    "rank crashes": _rank_crashes,
    "loader hangs": _loader_hangs,
    "rank stalls": _rank_stalls,
    "node dies": _node_dies,
    "preempted at once": _preempted_at_once,
    "preempted with grace": _preempted_with_grace,
    "checkpoint damaged": _checkpoint_damaged,
    "disk full": _disk_full,
    "rank slow": _rank_slow,
}


def half_written(run: Path) -> bool:
    """Whether a checkpoint is on its way."""
    return any((run / "checkpoints").glob("*.partial"))


def workers(pid: int) -> Iterator[int]:
    """The data workers of a rank: its forks."""
    own = _command(pid)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and _command(int(path.parent.name)) == own:
                yield int(path.parent.name)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def unsaved(run: Path) -> list[int]:
    """Steps whose checkpoints could not be written, as the run's events say."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if '"unsaved"' in line]


def fill(path: Path) -> None:
    """Take what is free on a file system, but for some room."""
    state = os.statvfs(path.parent)
    left = state.f_bavail * state.f_frsize - ROOM
    with path.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(b"\0" * min(left, 1 << 20))
