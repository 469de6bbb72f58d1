"""Notices a stalled rank: every rank writes its stacks to the run folder, and the job ends.

Ranks wait for each other in collectives, so when one stalls all stop beating; each rank's own
watchdog then writes where each of its threads stands. The rank that is not waiting in a collective
is the one to look at; the first line of each file says which collective
the rank is in, and since when.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

STALLED = 87  # exit code
# Seconds between the stacks and the exit. The first rank that leaves breaks the collectives of the
# others, and a rank thrown out of its collective would not show where it stood.
GRACE = 3.0


class Watchdog:
    """Ends the process when `beat` was not called for `limit` seconds.

    Args:
        folder: where `stacks-rank-00000.txt` goes.
        rank: this rank.
        limit: seconds; longer than the longest step, checkpoint or compilation.
        on_stall: told in a sentence that the process ends; must not wait for the stalled thread.
        where: says in a few words which collective the rank is in; must not wait, either.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limit: float,
        on_stall: Callable[[str], None] | None = None,
        where: Callable[[], str] | None = None,
    ) -> None:
        self._path = folder / f"stacks-rank-{rank:05d}.txt"
        self._rank = rank
        self._limit = limit
        self._on_stall, self._where = on_stall, where
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Say that this rank is alive; once per step."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Watch no longer; does not return when the end of the process was decided already."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._limit / 4)):
            if time.monotonic() - self._last > self._limit:
                self._end()

    def _end(self) -> None:
        # Nothing here may wait for another rank or for a lock of the stalled thread.
        place = "where it stands"
        try:
            if self._where is not None:
                place = f"it is {self._where()}; where it stands"
        except Exception as error:  # the end must not depend on it
            place = f"which collective it is in cannot be said ({error}); where it stands"
        try:
            with self._path.open("w") as file:
                file.write(f"rank {self._rank}: {place.removesuffix('; where it stands')}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:
            message = (
                f"rank {self._rank} has made no step for {self._limit:g} s; {place} is in "
                f"{self._path}"
            )
            os.write(sys.stderr.fileno(), f"error: {message}\n".encode())
            try:
                if self._on_stall is not None:
                    self._on_stall(message)
                time.sleep(GRACE)
            finally:
                os._exit(STALLED)
