"""Which failures to read are for good, and waiting until the others have passed.

"Not there" means that the storage itself said so: ENOENT, HTTP 404 or 410.  fsspec raises
FileNotFoundError for any failure to ask a web server the size of a file, so what lies behind an
error is looked at: a server that is busy (429, 503), restarting or unreachable is asked again.
"""

from __future__ import annotations

import asyncio
import email.utils
import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp

log = logging.getLogger(__name__)
T = TypeVar("T")

PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING = (aiohttp.ClientError, asyncio.TimeoutError, TimeoutError, ConnectionError)
_NOT_THERE, _FORBIDDEN = (404, 410), (401, 403, 451)
_LONGEST_WAIT = 60.0  # seconds, also where a server asks for more


class StorageError(OSError):
    """A range could not be read within the allowed number of attempts."""

    for_users = True  # the message is all that a user needs
    on_one_rank = True  # other ranks read other ranges


def retrying(action: Callable[[], T], what: str, *, attempts: int, first_wait: float) -> T:
    """Run `action`, waiting `first_wait` seconds after a failure and twice as long after each.

    A server's Retry-After is respected; no wait is longer than a minute.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError: at once.
        StorageError: after all attempts.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:
            final = permanent(error)
            if final is not None:
                raise final from (error.__cause__ if final is error else error)
            if attempt == attempts:
                raise StorageError(f"{what} failed {attempts} times: {_text(error)}") from error
            wait = first_wait * 2.0 ** min(attempt - 1, 30) * random.uniform(0.5, 1.5)
            wait = min(max(wait, _retry_after(error)), _LONGEST_WAIT)
            log.warning("%s failed (%s), trying again in %.1f s", what, _text(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable: attempts is at least 1")


def permanent(error: Exception) -> OSError | None:
    """What `error` really is where another attempt is useless: one of PERMANENT, else None."""
    status = http_status(error)
    if status in _FORBIDDEN:
        return PermissionError(errno.EACCES, f"the server refuses access: {_text(error)}")
    if status is not None and status not in _NOT_THERE:
        return None
    if isinstance(error, PERMANENT):
        passing = status is None and any(isinstance(cause, _PASSING) for cause in _causes(error))
        return None if passing else error
    return None if status is None else FileNotFoundError(errno.ENOENT, _text(error))


def cause_of(error: OSError) -> str:
    """The short name under which samples of a shard that raised `error` are counted."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing shard"
    if isinstance(error, IsADirectoryError):
        return "shard is a folder"
    return "forbidden shard" if isinstance(error, PermissionError) else "unreadable shard"


def http_status(error: BaseException) -> int | None:
    """Status that a web server answered with, of aiohttp's or requests' errors; None of others."""
    for cause in _causes(error):
        for status in (
            getattr(cause, "status", None),
            getattr(getattr(cause, "response", None), "status_code", None),
        ):
            if isinstance(status, int):
                return status
    return None


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 where it does not."""
    for cause in _causes(error):
        headers: Any = getattr(cause, "headers", None)
        text = str(headers.get("Retry-After", "")).strip() if hasattr(headers, "get") else ""
        if text.isdecimal():
            return float(text[:9])
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError):
            continue
    return 0.0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from, at most eight deep."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _text(error: Exception) -> str:
    return str(error) or repr(error)
