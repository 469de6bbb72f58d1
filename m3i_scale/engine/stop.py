"""Stopping well: a signal on any rank is a flag that all ranks see at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 85  # exit code of a run that saved and stopped because it was asked to


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; a second signal of the same kind acts as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.raised_by: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self.raised_by = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
