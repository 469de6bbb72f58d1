"""When each attempt of a run started, what its start-up consisted of, and how it ended.

    events.jsonl               rank 0's; one JSON object a line, in the order of time
    events-rank-NNNNN.jsonl    of another rank, if it ended with an error or stalled

Every line has `event`, `attempt` (one start of the ranks) and `time` (seconds since 1970):

    start      `parts`: pairs of a start-up part and when it began; `ranks`; `hosts`: of each rank;
               `job`, `restart`; `submitted`: when the scheduler was asked for this start, if known;
               `last_sign`: of the lock's owner before, if it had ended without releasing the lock
    part       `part`: the start-up part that begins
    begin      training begins: `step`; `run`: identity (`lineage`); `rollback`: within the attempt
    fault      `words`, `nodes`, `step`: a wrong result of a device, memory or the network
    unsaved    `step`, `words`: its checkpoint could not be written; training goes on
    passed over   `step`, `words`: its checkpoint is damaged; this start goes on from one before
    asked      `step`, `words`: a signal was heard; what follows is saving, and the end
    stalled    `words`: the watchdog ends the process
    end        `cause`: one of `CAUSES`; `words`; `checkpoint_wait_seconds` since the last step;
               `collective`: the one in which a crash came, mostly because another rank was lost

An attempt without an end was killed, or runs. A start that is refused writes nothing.
`m3i_scale.report` reads all this together with metrics.jsonl.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from m3i_scale.engine import lineage, processes
from m3i_scale.engine.lines import JsonLines

FILE = "events.jsonl"
RANK_FILES = "events-rank-*.jsonl"
# Of a start-up, in the usual order. An attempt may come back to one of them.
PARTS = ("launch", "imports", "nodes", "data", "checkpoint", "networks", "first steps")
MOST_WORDS = 500  # characters
CAUSES = ("finished", "stopped", "stalled", "corrupted", "error", "crashed")
# Set by slurm/common.sh: seconds since 1970 when the scheduler was asked for this start of the job,
# and when the job's script began.
SUBMITTED, JOB_STARTED = "M3I_SUBMITTED", "M3I_JOB_STARTED"


def new_name() -> str:
    """A name of an attempt."""
    return secrets.token_hex(6)


class Start:
    """The parts of this process's start-up so far, and the launchers above it.

    `launch` begins with the scheduler's job or the first launcher, `imports` with the process.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        process = processes.began(os.getpid()) or time.time()
        self.launchers = processes.launchers()
        above = [processes.began(pid) for pid in self.launchers]
        earlier = [_seconds(environment, JOB_STARTED), *above]
        launched = min((t for t in earlier if t is not None), default=process)
        self.submitted = _seconds(environment, SUBMITTED)
        self.parts: list[tuple[str, float]] = [("imports", process)]
        if launched < process:
            self.parts.insert(0, ("launch", launched))

    def enter(self, part: str) -> None:
        """Say that a part of `PARTS` begins now."""
        self.parts.append((part, time.time()))


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    try:
        return float(environment[name])
    except (KeyError, ValueError):
        return None


class EventLog:
    """Writes the events of one attempt; a context manager around it, inside the lock of the folder.

    Nothing is written before `start`: a start that is refused leaves the folder as it is.

    Args:
        folder: the run folder.
        rank: this rank; all but 0 write their errors only.
        attempt: its name, the same on all ranks.
        hosts: of each rank.
        start: what has happened in this process so far.
        last_sign: when the lock's owner before has last shown a sign of life, if it was killed.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        attempt: str,
        hosts: Sequence[str],
        start: Start,
        last_sign: float | None = None,
    ) -> None:
        self.attempt = attempt
        self.ending: tuple[str, str] = ("finished", "")  # cause and words, unless an error ends it
        self.checkpoint_wait = 0.0  # seconds since the last step
        self._path = folder / (FILE if rank == 0 else f"events-rank-{rank:05d}.jsonl")
        self._rank, self._hosts, self._last_sign = rank, list(hosts), last_sign
        self._start = start
        self._lines: JsonLines | None = None
        self._started = False
        self._passed_over: list[tuple[int, str]] = []  # before the start is recorded

    def enter(self, part: str) -> None:
        """Say that a part of the start-up begins now."""
        if self._lines is None:
            self._start.enter(part)
        else:
            self._write("part", part=part)

    def start(self) -> None:
        """Begin the record, with all that has happened so far.

        Raises:
            OSError: the file cannot be opened.
        """
        self._started = True
        if self._rank == 0 and self._lines is None:
            self._lines = JsonLines(self._path)
            self._write(
                "start", parts=self._start.parts, ranks=len(self._hosts), hosts=self._hosts,
                job=lineage.this_job(), restart=lineage.restarts(),
                submitted=self._start.submitted, last_sign=self._last_sign,
            )  # fmt: skip
            for step, words in self._passed_over:
                self._write("passed over", step=step, words=_short(words))

    def begin(self, step: int, run: str, *, rollback: bool) -> None:
        """Say that training begins, or after a rollback begins again, at a step."""
        self._write("begin", step=step, run=run, rollback=rollback)

    def fault(self, step: int, words: str, nodes: Sequence[str] = ()) -> None:
        """Say that the hardware has made an error, whether the run goes on or not."""
        self._write("fault", step=step, words=_short(words), nodes=list(nodes))

    def unsaved(self, step: int, words: str) -> None:
        """Say that the checkpoint of a step could not be written."""
        self._write("unsaved", step=step, words=_short(words))

    def passed_over(self, step: int, words: str) -> None:
        """Say that the checkpoint of a step is damaged; written with the start, if there is one."""
        self._passed_over.append((step, words))

    def asked(self, step: int, words: str) -> None:
        """Say that this attempt was asked to stop, and saves."""
        self.ending = ("stopped", words)
        self._write("asked", step=step, words=_short(words))

    def stalled(self, words: str) -> None:
        """Say from the watchdog's thread that the process ends; waits for no lock.

        Every rank does: the one that reports to the folder otherwise may be the one that is frozen.
        """
        self._open_own()
        self._write("stalled", words=_short(words))

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._started:
            return
        broken: dict[str, str] = {}
        if error is not None:
            self.ending = _how(error)
            broken = _broken(error)
            self._open_own()
        cause, words = self.ending
        self._write(
            "end", cause=cause, words=_short(words),
            checkpoint_wait_seconds=self.checkpoint_wait, **broken,
        )  # fmt: skip
        if self._lines is not None:
            self._lines.close()

    def _open_own(self) -> None:
        """The file of another rank than 0, which is there only if that has something to say."""
        if self._rank and self._lines is None:
            with contextlib.suppress(OSError):  # the sentence is on its standard error, too
                self._lines = JsonLines(self._path)

    def _write(self, event: str, **values: Any) -> None:
        if self._lines is not None:
            self._lines.write(
                {"event": event, "attempt": self.attempt, "time": time.time(), **values}
            )
            self._lines.sync()


def _how(error: BaseException) -> tuple[str, str]:
    """The cause of an end by an exception, and its words."""
    if getattr(error, "for_users", False):
        return getattr(error, "cause", "error"), str(error)
    return "crashed", f"{type(error).__name__}: {error}"


def _broken(error: BaseException) -> dict[str, str]:
    """The collective that a crash came in, as a value of its event."""
    name = getattr(error, "broken_collective", None)  # set by `communication`
    return {} if name is None or getattr(error, "for_users", False) else {"collective": name}


def _short(words: str) -> str:
    return " ".join(words.split())[:MOST_WORDS]
