"""Stopping well: a signal on any rank is a flag that all ranks see at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from m3i_scale.engine import processes

STOPPED = 85  # exit code of a run that saved and stopped because it was asked to
PATIENCE = 5.0  # seconds


class StoppedEarly(Exception):  # noqa: N818  (somebody asked for it)
    """The run was asked to stop before its first step, and there is nothing to save."""

    for_users = True
    exit_code = STOPPED


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1, and by the end of a launcher above this process.

    Schedulers and launchers repeat their signal within milliseconds, so repeats are ignored for
    `patience` seconds after the first; a later one ends the process at once.

    A launcher that is killed does not take its ranks along: `deepspeed` dies of SIGTERM and leaves
    them training for nobody. Each rank therefore looks for its launchers every second; `launchers`
    are those that it found when it started (`processes.launchers`), which may have gone since.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(
        self, *, patience: float = PATIENCE, launchers: dict[int, int | None] | None = None
    ) -> None:
        self.raised_by: str | None = None
        self._patience = patience
        self._first = 0.0
        for number in self.SIGNALS:
            signal.signal(number, self._raise)
        self._launchers = processes.launchers() if launchers is None else launchers
        if self._launchers:
            threading.Thread(target=self._watch, name="launcher-watch", daemon=True).start()

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.raised_by = signal.Signals(number).name
        elif now - self._first > self._patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        while all(processes.is_running(*known) for known in self._launchers.items()):
            time.sleep(1.0)
        self.raised_by = self.raised_by or "the end of its launcher"
