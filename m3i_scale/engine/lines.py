"""A file of JSON lines that survives what happens to its writer and to its disk.

Each line is one `write` to the end of the file, so that `kill -9` leaves at most one damaged line,
the last; the next writer cuts that off. What a full disk does not take waits in memory. Readers
pass over what they cannot read (a node that loses power may leave a block of zeros).

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def of_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a line of metrics.jsonl that repeat when its step is made again.

    Left out are times, figures of machines, counts of checks, and which attempt made the step.
    """
    return {
        key: value
        for key, value in values.items()
        if key not in ("time", "attempt")
        and "second" not in key
        and not key.startswith(("machine/", "verify/"))
    }


class JsonLines:
    """Appends to a file of JSON lines; one writer at a time.

    Raises (in the constructor only):
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        _drop_torn_line(path)
        self._unwritten = b""
        self._failing = False

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; what a full disk does not take is kept for the next time."""
        self._unwritten += json.dumps(values).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._failing:
                log.error("%s: %s; its lines are kept in memory", self._path, error.strerror)
        self._failing = bool(self._unwritten)

    def sync(self) -> None:
        """Force to disk what has been written, where the file system can."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.warning("%s: %s", self._path, error.strerror)

    def close(self) -> None:
        """Write what waits, if the disk takes it now, and close."""
        self._write()
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash or a full disk has left without an end."""
    with path.open("rb+") as file:
        start = max(0, file.seek(0, os.SEEK_END) - (1 << 20))
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)
