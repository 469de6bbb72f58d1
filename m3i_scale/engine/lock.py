"""One run, one folder: a lock file that says who trains there, and that works on NFS.

The file is created exclusively, which NFS does atomically where `flock` may be a no-op, and holds
host, process, job and start. Its owner renews a counter in it every `BEAT` seconds. Another start
finds out whether the owner lives:

* the same job, restarted: the lock is its own;
* the same machine: by the process's number and start time;
* another machine: the counter moves, or it has not for `STALE` seconds. Clocks are not compared.

An owner that finds somebody else's name in the file has been given up for dead, and ends at once:
it must not write any more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from m3i_scale.config import ConfigError
from m3i_scale.engine import lineage, processes

log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two signs of life
# Seconds without one, after which an owner on another machine counts as dead: longer than an NFS
# client may believe what it has cached of a folder (acdirmax, 60 s).
STALE = 75.0
SETTLE = 1.0  # seconds in which two starts that take over the same lock become visible
LOST = 88  # exit code of an owner that has been given up for dead


class RunLock:
    """Ownership of a run folder; a context manager.

    Args:
        folder: the run folder; it is made.
        beat: seconds between signs of life.
        stale: seconds without one that make the owner dead.

    Raises (entering):
        ConfigError: another start owns the folder; the message says which.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT, stale: float = STALE) -> None:
        self._path = folder / "lock.json"
        self._beat, self._stale = beat, stale
        self.last_sign: float | None = None  # of a dead owner that has been followed, time of day
        self._mine = _identity()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            if self._take_over():
                break
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        owner = _read(self._path)
        if owner is not None and owner.get("token") == self._mine["token"]:
            with contextlib.suppress(OSError):  # the folder has gone; there is nothing to release
                self._path.unlink()

    def _create(self) -> bool:
        """Create the file if there is none."""
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self._mine, file, indent=1)
        except OSError:  # an empty lock would look like a start that is about to write it
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self) -> bool:
        """Take the lock of a dead owner; False if the file has gone meanwhile.

        Raises:
            ConfigError: the owner lives.
        """
        owner = self._dead_owner()
        if owner is None or _pulse(_read(self._path) or {}) != _pulse(owner):
            return False  # gone, or somebody else's by now
        with contextlib.suppress(OSError):
            self.last_sign = self._path.stat().st_mtime
        self._write()
        time.sleep(SETTLE)  # of several starts that take it over, the last one to write has it
        found = _read(self._path)
        if found is None or found.get("token") != self._mine["token"]:
            raise self._held(found or {})
        log.warning("the lock of %s is taken over: %s has ended without releasing it",
                    self._path.parent, _describe(owner))  # fmt: skip
        return True

    def _dead_owner(self) -> dict[str, Any] | None:
        """The owner, known to be dead; None if the file has gone.

        Raises:
            ConfigError: it lives.
        """
        first = self._read_complete()
        if first is None:
            return None
        job = first.get("job")
        if job is not None and job == self._mine["job"] and _is_later_restart(first, self._mine):
            return first
        if _same_machine(first, self._mine):
            if processes.is_running(first.get("pid", 0), first.get("born")):
                raise self._held(first)
            return first
        log.warning(
            "%s has a lock of %s; waiting up to %g s for a sign of life",
            self._path.parent, _describe(first), self._stale,
        )  # fmt: skip
        end = time.monotonic() + self._stale
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat))
            now = _read(self._path)
            if now is None and not self._path.exists():
                return None
            if now is not None and _pulse(now) != _pulse(first):
                raise self._held(now)
        return first

    def _read_complete(self) -> dict[str, Any] | None:
        """The owner; {} if the file stays unreadable, None if it goes."""
        for _ in range(20):
            owner = _read(self._path)
            if owner is not None:
                return owner
            if not self._path.exists():
                return None
            time.sleep(0.1)  # created, and not written yet
        return {}

    def _held(self, owner: Mapping[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self._path.parent} is in use: {_describe(owner)} trains there. Choose another run "
            f"name, wait for it (Slurm: --dependency=singleton), or, if it is certainly dead, "
            f"remove {self._path}"
        )

    def _renew(self) -> None:
        while not self._stopped.wait(self._beat):
            try:
                owner = json.loads(self._path.read_text())
            except FileNotFoundError:
                owner = None
            except (OSError, ValueError):  # a file system that hangs or is full; not a new owner
                continue
            if owner is not None and owner.get("token") != self._mine["token"]:
                self._end(owner)
            self._mine["beats"] += 1
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        new = self._path.with_name(f"lock.{self._mine['token']}.new")
        try:
            new.write_text(json.dumps(self._mine, indent=1))
            os.replace(new, self._path)
        finally:
            new.unlink(missing_ok=True)

    def _end(self, owner: Mapping[str, Any]) -> None:
        # The other owner writes here now, so that nothing may be saved or tidied up.
        message = (
            f"error: {_describe(owner)} has taken over {self._path.parent}; this process was taken "
            "for dead and ends\n"
        )
        os.write(sys.stderr.fileno(), message.encode())
        os._exit(LOST)


def sign_of_life(folder: Path) -> tuple[float, bool] | None:
    """When the owner of a run folder last renewed its lock, and whether it lives, for all we know.

    None if nobody owns the folder. Unlike a start, this does not wait, and compares clocks.
    """
    path = folder / "lock.json"
    try:
        renewed = path.stat().st_mtime
    except OSError:
        return None
    owner = _read(path) or {}
    if _same_machine(owner, _identity()):
        return renewed, processes.is_running(owner.get("pid", 0), owner.get("born"))
    return renewed, time.time() - renewed < STALE


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": processes.machine(),
        "pid": os.getpid(),
        "born": processes.start_time(os.getpid()),
        "job": lineage.this_job(),
        "restart": lineage.restarts(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": secrets.token_hex(8),
        "beats": 0,
    }


def _same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = ("host", "machine")
    return all(one.get(name) == other.get(name) for name in names)


def _is_later_restart(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return isinstance(old.get("restart"), int) and old["restart"] < new["restart"]


def _pulse(owner: Mapping[str, Any]) -> tuple[Any, Any]:
    return owner.get("token"), owner.get("beats")


def _describe(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another start that has not said which"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, started {owner.get('started')}"


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None if there is no file, or nothing readable in it yet."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
