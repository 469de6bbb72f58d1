"""A bounded disk cache of blocks of remote files, shared by all processes of a machine.

Blocks are whole files that appear by rename after fsync: a reader never sees half a block, and
neither does the next run after a crash.  The space is reserved in a counter under a file lock
before anything is written, so the limit also holds while many processes write.  The counter heals
itself: when it reaches the limit, the folder is measured and the blocks that were used least
recently go.  Files behind a URL are taken to be immutable, as shards are.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

Fetch = Callable[[int, int], bytes]  # bytes [start, stop) of the remote file; short at its end
_ABANDONED = 600.0  # seconds after which a temporary file is what a crash left behind


class DiskCache:
    """Block cache in `folder`, never larger than `max_bytes`.

    Raises ValueError when not even four blocks fit.
    """

    def __init__(self, folder: str | Path, max_bytes: int, *, block_bytes: int = 4 << 20) -> None:
        if max_bytes < 4 * block_bytes:
            raise ValueError(
                f"a cache of {max_bytes} bytes is too small for blocks of {block_bytes}: "
                f"give it at least {4 * block_bytes} bytes"
            )
        self.folder, self.max_bytes, self.block_bytes = Path(folder), max_bytes, block_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, url: str, start: int, stop: int, fetch: Fetch) -> bytes:
        """Bytes [start, stop) of `url` from the cache; what is missing comes from `fetch`."""
        size = self.block_bytes
        spans = {  # the wanted part of every block
            number: (max(start - number * size, 0), min(stop - number * size, size))
            for number in range(start // size, -(-stop // size))
        }
        parts = {number: self._load(url, number, *span) for number, span in spans.items()}
        for first, last in _runs([number for number in spans if parts[number] is None]):
            data = fetch(first * size, last * size)
            for number in range(first, last):
                block = data[(number - first) * size : (number - first + 1) * size]
                parts[number] = block[slice(*spans[number])]
                if block:
                    self._save(url, number, block)
        return b"".join(parts[number] or b"" for number in spans)

    def used(self) -> int:
        """Bytes on disk now."""
        with self._locked():
            return sum(size for _, size, _ in self._files())

    def _path(self, url: str, number: int) -> Path:
        name = hashlib.sha256(url.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}-{self.block_bytes}-{number}"

    def _load(self, url: str, number: int, low: int, high: int) -> bytes | None:
        path = self._path(url, number)
        try:
            with open(path, "rb", buffering=0) as file:
                os.utime(file.fileno())  # the time of last use, by which blocks are thrown out
                return os.pread(file.fileno(), high - low, low)
        except FileNotFoundError:
            return None

    def _save(self, url: str, number: int, block: bytes) -> None:
        path = self._path(url, number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(temporary, len(block))
            with open(temporary, "r+b") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                os.replace(temporary, path)
        except OSError as error:  # a full or broken disk costs speed, not the run
            log.warning("cannot cache a block in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                os.remove(temporary)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Create the file at its full length, making room first where it would not fit."""
        with self._locked() as counter:
            text = os.pread(counter, 32, 0)
            used = int(text) if text.isdigit() else self.max_bytes  # unknown: measure
            if used + size > self.max_bytes:
                used = self._make_room(size)
            with open(temporary, "wb") as file:
                file.truncate(size)
            os.ftruncate(counter, 0)
            os.pwrite(counter, str(used + size).encode(), 0)

    def _make_room(self, size: int) -> int:
        """Throw out the oldest blocks until `size` and a tenth of the cache are free."""
        files = sorted(self._files())
        used = sum(length for _, length, _ in files)
        goal = max(0, min(self.max_bytes - size, self.max_bytes * 9 // 10 - size))
        for changed, length, path in files:
            if path.suffix == ".tmp" and time.time() - changed < _ABANDONED:
                continue
            if used <= goal and path.suffix != ".tmp":
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            used -= length
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        handle = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # which also unlocks


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last + 1) of the runs of consecutive numbers: 1 2 3 7 -> (1, 4), (7, 8)."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i
