"""Reading byte ranges of files behind any fsspec URL, with retries and an optional disk cache.

Permanent failures (no such file, no permission) are raised at once as `OSError`; everything else
is tried again with exponential back-off and jitter, then raised as `StorageError` (retry.py).
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from fsspec.core import split_protocol, url_to_fs

from m3i_scale.config import Storage
from m3i_scale.data.cache import DiskCache
from m3i_scale.data.retry import PERMANENT, StorageError, http_status, permanent, retrying

__all__ = ["PERMANENT", "StorageClient", "StorageError", "is_local", "join", "local_path",
           "parent", "retrying"]  # fmt: skip

T = TypeVar("T")
_PIPE = "pipe:"
# What file systems say of the state of an object, by which a changed one is told from the old.
_STATE = ("ETag", "etag", "generation", "LastModified", "last_modified", "Last-Modified", "updated")


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (plain or file://)."""
    return split_protocol(url)[0] in (None, "file", "local") and not url.startswith(_PIPE)


def local_path(url: str) -> str:
    """The plain path behind a local URL."""
    return url if split_protocol(url)[0] is None else str(url_to_fs(url)[1])


def join(base: str, path: str) -> str:
    """`path` if it is a URL or absolute, else `path` beside the folder or URL `base`."""
    if split_protocol(path)[0] or path.startswith(("/", _PIPE)):
        return path
    return f"{base.rstrip('/')}/{path}" if base else path


def parent(url: str) -> str:
    """Folder or URL prefix of `url`."""
    return url.rsplit("/", 1)[0] if "/" in url else ""


class StorageClient:
    """Byte ranges of local files (pread) and of remote objects (one range request each).

    Safe to use from several threads and to hand to spawned or forked processes: file handles and
    connections belong to the process that makes them.

    Args:
        settings: retries, cache, options of the file systems, `pipe:`; None for the defaults.
        first_wait: seconds before the second attempt; twice as long before each further one.

    Raises:
        ValueError: the cache is too small, or its folder is a file.
    """

    def __init__(self, settings: Storage | None = None, *, first_wait: float = 0.5) -> None:
        self.settings, self.first_wait = settings or Storage(), first_wait
        folder, size = self.settings.cache, round(self.settings.cache_gibibytes * 2**30)
        self.cache = DiskCache(folder, size) if folder else None

    def check(self, url: str) -> str:
        """Return `url`; refuse what cannot be written to an index, and a shell command in its
        place unless the configuration allows it."""
        if not url.isascii() and not _is_unicode(url):
            raise ValueError(f"the path {url!r} is not UTF-8: rename that file or folder")
        if url.startswith(_PIPE) and not self.settings.allow_pipe:
            raise ValueError(
                f"{url!r} would run a shell command: name a path or an fsspec URL instead, "
                "or set allow_pipe if you trust whoever wrote that shard list"
            )
        return url

    def read(self, url: str, start: int, stop: int, *, version: str | None = "") -> bytes:
        """Bytes [start, stop) of `url`; fewer only where the file ends.

        What the cache holds of another `version` of the file is not used, and nothing of it where
        that is None.  Raises OSError when the file is missing, StorageError after all attempts.
        """
        if self.check(url).startswith(_PIPE):
            url = self._spool(url)
        if is_local(url):
            return self.retry(lambda: _read_local(local_path(url), start, stop), f"reading {url}")
        if self.cache and version is not None:
            key = f"{url} {version}" if version else url
            return self.cache.read(key, start, stop, lambda low, high: self._fetch(url, low, high))
        return self._fetch(url, start, stop)

    def size(self, url: str) -> int:
        """Length of `url` in bytes."""
        if self.check(url).startswith(_PIPE):
            return os.path.getsize(self._spool(url))
        return self.state(url)[0]

    def state(self, url: str) -> tuple[int, str]:
        """Length of `url` in bytes, and what else tells this version of it from others, or ""."""
        return self.retry(lambda: self._state(url), f"asking the size of {url}")

    def open(self, url: str, *, buffer_bytes: int = 8 << 20) -> io.BufferedReader:
        """Open `url` for reading and seeking; remote reads are retried, `buffer_bytes` at once."""
        if self.check(url).startswith(_PIPE):
            url = self._spool(url)
        if is_local(url):
            return open(local_path(url), "rb")
        return io.BufferedReader(_RangeFile(self, url), buffer_bytes)

    def glob(self, pattern: str) -> list[str]:
        """URLs that match `pattern`, sorted, with the protocol of the pattern."""
        filesystem, path = url_to_fs(pattern, **self._options(pattern))
        found = sorted(self.retry(lambda: filesystem.glob(path), f"listing {pattern}"))
        if not is_local(pattern):
            found = [filesystem.unstrip_protocol(name) for name in found]
        return [self.check(url) for url in found]

    def retry(self, action: Callable[[], T], what: str) -> T:
        """Run `action` until it succeeds, as often as the settings allow (`retrying`)."""
        attempts = self.settings.retries + 1
        return retrying(action, what, attempts=attempts, first_wait=self.first_wait)

    def _fetch(self, url: str, start: int, stop: int) -> bytes:
        what = f"reading bytes {start}-{stop} of {url}"
        return self.retry(lambda: self._read_remote(url, start, stop), what)

    def _read_remote(self, url: str, start: int, stop: int) -> bytes:
        filesystem, path = url_to_fs(url, **self._options(url))
        try:
            data: bytes = filesystem.cat_file(path, start=start, end=stop)
        except Exception as error:
            # Servers answer a range beyond the end with an error of their own kind (HTTP: 416).
            if permanent(error) or http_status(error) not in (None, 416):
                raise
            if start < self._state(url)[0]:
                raise
            return b""
        if len(data) > stop - start:  # a server that ignores Range sends the whole file
            data = data[start:stop]
        if len(data) < stop - start and len(data) < min(stop, self._state(url)[0]) - start:
            raise EOFError(f"{len(data)} bytes came, then the connection ended")
        return data

    def _state(self, url: str) -> tuple[int, str]:
        filesystem, path = url_to_fs(url, **self._options(url))
        info = filesystem.info(path)
        if info.get("size") is None:
            raise OSError(f"the server does not tell the size of {url}")
        return int(info["size"]), " ".join(str(info[name]) for name in _STATE if name in info)

    def _options(self, url: str) -> dict[str, Any]:
        protocol, options = split_protocol(url)[0], self.settings.options
        if protocol in ("http", "https"):
            timeout = aiohttp.ClientTimeout(total=300, sock_connect=20, sock_read=30)
            return {"client_kwargs": {"timeout": timeout}, **options.get(protocol, {})}
        return options.get(protocol or "file", {})

    def _spool(self, url: str) -> str:
        """Run the command of an allowed `pipe:` URL once per machine, into a file to seek in."""
        folder = Path(tempfile.gettempdir()) / f"m3i-pipe-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        if not path.exists():
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            try:
                with open(temporary, "xb") as file:
                    command = url.removeprefix(_PIPE)
                    subprocess.run(command, shell=True, check=True, stdout=file)  # noqa: S602
                os.replace(temporary, path)
            except subprocess.CalledProcessError as error:
                raise StorageError(f"{url} ended with status {error.returncode}") from None
            finally:
                temporary.unlink(missing_ok=True)
        return str(path)


class _RangeFile(io.RawIOBase):
    """A remote file whose reads are `StorageClient.read`."""

    def __init__(self, storage: StorageClient, url: str) -> None:
        self._storage, self._url = storage, url
        self._at, (self._length, state) = 0, storage.state(url)
        # Indexes are made again under the same name: without a word on their state, no cache.
        self._version = state or None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._length)
        if stop <= self._at:
            return 0
        data = self._storage.read(self._url, self._at, stop, version=self._version)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _is_unicode(text: str) -> bool:
    """False for a file name of bytes that are not UTF-8, which Python spells with surrogates."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _read_local(path: str, start: int, stop: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        # Python sets aside what is asked for, which an index may have wrong.
        stop = min(stop, os.fstat(handle).st_size)
        return os.pread(handle, max(0, stop - start), start)
    finally:
        os.close(handle)
