"""Reading byte ranges of files behind any fsspec URL, with retries.

Permanent failures (no such file, no permission) are raised at once as `OSError`; everything else
is tried again with exponential back-off and jitter, then raised as `StorageError`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import split_protocol, url_to_fs

log = logging.getLogger(__name__)
T = TypeVar("T")

PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(OSError):
    """A range could not be read within the allowed number of attempts."""


def check_url(url: str, *, allow_pipe: bool = False) -> str:
    """Return `url`; refuse a shell command in its place unless the configuration allows it."""
    if url.startswith("pipe:") and not allow_pipe:
        raise ValueError(
            f"{url!r} would run a shell command: a shard is a path or an fsspec URL; "
            "set allow_pipe to run commands that come from your own configuration"
        )
    return url


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (plain or file://)."""
    return split_protocol(url)[0] in (None, "file", "local")


def local_path(url: str) -> str:
    """The plain path behind a local URL."""
    return str(url_to_fs(url)[1])


def join(base: str, path: str) -> str:
    """`path` if it is a URL or absolute, else `path` beside the folder or URL `base`."""
    if split_protocol(path)[0] or path.startswith(("/", "pipe:")):
        return path
    return f"{base.rstrip('/')}/{path}" if base else path


def parent(url: str) -> str:
    """Folder or URL prefix of `url`."""
    return url.rsplit("/", 1)[0] if "/" in url else ""


def retrying(action: Callable[[], T], what: str, *, attempts: int, first_wait: float) -> T:
    """Run `action`, waiting `first_wait` seconds after a failure and twice as long after each."""
    for attempt in range(attempts):
        try:
            return action()
        except PERMANENT:
            raise
        except Exception as error:
            if attempt + 1 == attempts:
                raise StorageError(f"{what} failed {attempts} times: {error!r}") from error
            wait = first_wait * 2**attempt * random.uniform(0.5, 1.5)
            log.warning("%s failed (%r), trying again in %.1f s", what, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


class Storage:
    """Byte ranges of local files (pread) and of remote objects (one range request each).

    Safe to use from several threads and to hand to spawned or forked processes: file handles and
    connections are made by the process that uses them.
    """

    def __init__(
        self,
        *,
        attempts: int = 5,
        first_wait: float = 0.5,
        options: dict[str, Any] | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}: a read needs at least 1")
        self.attempts, self.first_wait = attempts, first_wait
        self.options = options or {}

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of `url`; fewer only where the file ends.

        Raises OSError when the file is missing or unreadable, StorageError after all attempts.
        """
        if is_local(url):
            return self._read_local(local_path(url), start, stop)
        what = f"reading bytes {start}-{stop} of {url}"
        return retrying(
            lambda: self._read_remote(url, start, stop),
            what,
            attempts=self.attempts,
            first_wait=self.first_wait,
        )

    def size(self, url: str) -> int:
        """Length of `url` in bytes."""

        def ask() -> int:
            filesystem, path = url_to_fs(url, **self._options(url))
            return int(filesystem.size(path))

        return retrying(
            ask, f"asking the size of {url}", attempts=self.attempts, first_wait=self.first_wait
        )

    def open(self, url: str, mode: str = "rb") -> Any:
        """Open `url` as a file object (fsspec's `open`)."""
        return fsspec.open(url, mode, **self._options(url)).open()

    def glob(self, pattern: str) -> list[str]:
        """URLs that match `pattern`, sorted, with the protocol of the pattern."""
        filesystem, path = url_to_fs(pattern, **self._options(pattern))
        found = sorted(filesystem.glob(path))
        return found if is_local(pattern) else [filesystem.unstrip_protocol(name) for name in found]

    def _options(self, url: str) -> dict[str, Any]:
        return {} if is_local(url) else self.options

    @staticmethod
    def _read_local(path: str, start: int, stop: int) -> bytes:
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.pread(handle, stop - start, start)
        finally:
            os.close(handle)

    def _read_remote(self, url: str, start: int, stop: int) -> bytes:
        filesystem, path = url_to_fs(url, **self._options(url))
        data: bytes = filesystem.cat_file(path, start=start, end=stop)
        if not data:
            raise EOFError(f"no byte between {start} and {stop}")
        return data


def write_atomically(path: str, data: bytes) -> None:
    """Write a local file so that a reader or a crash never sees half of it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
