"""A bounded disk cache of blocks of remote files, shared by all processes of a machine.

Every block is a file with a CRC-32 per page of 64 KiB, which is verified on reading: a block that
disk, crash or another program damaged is dropped and fetched again.  Blocks appear by rename after
fsync from names that no other thread, process, container or host uses, so a reader never sees half
a block.  The space is reserved in a counter under a file lock before anything is written, so the
limit also holds while many processes write.  The counter heals itself: when it reaches the limit,
the folder is measured and the blocks that were used least recently go.

A cache that cannot be read or written costs speed, never data: what fails is counted in `faults`,
said once in every process, and the bytes come from the source.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

Fetch = Callable[[int, int], bytes]  # bytes [start, stop) of the remote file; short at its end
_ABANDONED = 600.0  # seconds after which a temporary file is what a crash left behind
_PAUSE = 60.0  # seconds without another attempt to write after one that failed
_PAGE = 64 << 10  # bytes under one checksum: a small read verifies little more than it returns
_SUM = 4  # bytes of a checksum


class DiskCache:
    """Block cache in `folder`, never larger than `max_bytes`.

    Attributes:
        faults: Counter of "damaged block", "cannot read" and "cannot write", in this process.

    Raises ValueError when not even four blocks fit, or where `folder` is a file.
    """

    def __init__(self, folder: str | Path, max_bytes: int, *, block_bytes: int = 4 << 20) -> None:
        if max_bytes < 4 * block_bytes:
            raise ValueError(
                f"a cache of {max_bytes} bytes is too small for blocks of {block_bytes}: "
                f"give it at least {4 * block_bytes} bytes"
            )
        self.folder, self.max_bytes, self.block_bytes = Path(folder), max_bytes, block_bytes
        self.faults: Counter[str] = Counter()
        self._said: set[str] = set()
        self._no_writes_before = 0.0  # time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"the cache {self.folder} is a file or lies below one: name a folder"
            ) from None
        except OSError as error:
            self._note("cannot write", error)

    def read(self, key: str, start: int, stop: int, fetch: Fetch) -> bytes:
        """Bytes [start, stop) of the file `key` from the cache; the rest comes from `fetch`."""
        size = self.block_bytes
        spans = {  # the wanted part of every block
            number: (max(start - number * size, 0), min(stop - number * size, size))
            for number in range(start // size, -(-stop // size))
        }
        parts = {number: self._load(key, number, *span) for number, span in spans.items()}
        for first, last in _runs([number for number in spans if parts[number] is None]):
            data = fetch(first * size, last * size)
            for number in range(first, last):
                block = data[(number - first) * size : (number - first + 1) * size]
                parts[number] = block[slice(*spans[number])]
                if block and time.monotonic() >= self._no_writes_before:
                    self._save(key, number, block)
        return b"".join(parts[number] or b"" for number in spans)

    def used(self) -> int:
        """Bytes on disk now."""
        with self._locked():
            return sum(size for _, size, _ in self._files())

    def _path(self, key: str, number: int) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}-{number}-{self.block_bytes}"

    def _load(self, key: str, number: int, low: int, high: int) -> bytes | None:
        """Bytes [low, high) of a block, fewer at the file's end; None where it must be fetched."""
        path = self._path(key, number)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note("cannot read", error)
            return None
        try:
            with contextlib.suppress(OSError):  # the blocks of another user, a read-only mount
                os.utime(handle)  # the time of last use, by which blocks are thrown out
            data = _verified(handle, path.name, low, high)
        except OSError as error:
            self._note("cannot read", error)
            return None
        finally:
            os.close(handle)
        if data is None:
            self._note("damaged block", f"{path} does not match its checksums")
            with contextlib.suppress(OSError):
                path.unlink()
        return data

    def _save(self, key: str, number: int, block: bytes) -> None:
        path = self._path(key, number)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        sums = _checksums(block, path.name, len(block), 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._reserve(temporary, len(block) + len(sums)):
                return
            with open(temporary, "r+b") as file:
                file.write(block)
                file.write(sums)
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                os.replace(temporary, path)
        except OSError as error:
            self._no_writes_before = time.monotonic() + _PAUSE
            self._note("cannot write", error)
            with contextlib.suppress(OSError):
                os.remove(temporary)

    def _note(self, fault: str, detail: object) -> None:
        """Count a fault, and say its first occurrence in this process."""
        self.faults[fault] += 1
        if fault not in self._said:
            self._said.add(fault)
            log.warning(
                "cache %s: %s (%s); reading goes on from the source, slower. Further faults of "
                "this kind are counted only.", self.folder, fault, detail,
            )  # fmt: skip

    def _reserve(self, temporary: Path, size: int) -> bool:
        """Create the file at its full length, making room first where it would not fit.

        False where what others are writing just now takes all the room.
        """
        with self._locked() as counter:
            text = os.pread(counter, 32, 0)
            used = int(text) if text.isdigit() else self.max_bytes  # unknown: measure
            if used + size > self.max_bytes:
                used = self._make_room(size)
            if used + size > self.max_bytes:
                return False
            with open(temporary, "xb") as file:
                file.truncate(size)
            os.ftruncate(counter, 0)
            os.pwrite(counter, str(used + size).encode(), 0)
        return True

    def _make_room(self, size: int) -> int:
        """Throw out the oldest blocks until `size` and a tenth of the cache are free.

        Raises OSError where there is no room because blocks cannot be removed.
        """
        files = sorted(self._files())
        used = sum(length for _, length, _ in files)
        goal = max(0, min(self.max_bytes - size, self.max_bytes * 9 // 10 - size))
        refused: OSError | None = None
        for changed, length, path in files:
            if path.suffix == ".tmp" and time.time() - changed < _ABANDONED:
                continue
            if used <= goal and path.suffix != ".tmp":
                break
            try:
                path.unlink(missing_ok=True)
                used -= length
            except OSError as error:  # another user's block stays, and stays counted
                refused = error
        if refused is not None and used + size > self.max_bytes:
            raise refused
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
        handle = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # which also unlocks


def _checksums(data: bytes, name: str, length: int, page: int) -> bytes:
    """Four bytes for each page of `data`, the first of which is the block's page number `page`.

    They depend on the block's name and length and on the page's number too, so that bytes of
    another place and what is left of a shortened file never pass.
    """
    view, seed = memoryview(data), zlib.crc32(f"{name} {length}".encode())
    sums = [
        zlib.crc32(view[at : at + _PAGE], seed ^ (page + at // _PAGE))
        for at in range(0, len(data), _PAGE)
    ]
    return struct.pack(f"<{len(sums)}I", *sums)


def _verified(handle: int, name: str, low: int, high: int) -> bytes | None:
    """Bytes [low, high) of an open block, fewer at the end of its data; None where it is damaged.

    The file is the data, then the checksum of each page of it.
    """
    stored = os.fstat(handle).st_size
    length = stored - _SUM * -(-stored // (_PAGE + _SUM))
    if length <= 0:
        return None
    pages = -(-length // _PAGE)
    first, stop = min(low // _PAGE, pages - 1), min(-(-high // _PAGE), pages)
    stop = max(stop, first + 1)  # a range beyond the end verifies where the end is
    wanted = min(stop * _PAGE, length) - first * _PAGE
    data = os.pread(handle, wanted, first * _PAGE)
    sums = os.pread(handle, _SUM * (stop - first), length + _SUM * first)
    if len(data) < wanted or sums != _checksums(data, name, length, first):
        return None
    return data[low - first * _PAGE : high - first * _PAGE]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last + 1) of the runs of consecutive numbers: 1 2 3 7 -> (1, 4), (7, 8)."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i
