"""Worker processes that end with their parent, however that ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any


class WorkerLost(RuntimeError):  # noqa: N818  (the name is the message)
    """A worker process ended without a word, as when memory runs out."""

    for_users = True


@contextmanager
def process_map(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over that many processes, results in order.

    SIGTERM leaves this block by SystemExit, so that what is half done is cleaned up.  Workers end
    at once when the block is left by an exception, or when this process is gone (SIGKILL): each
    waits on a pipe whose other end this process alone holds.

    Raises:
        WorkerLost: a worker was killed.
    """
    with _terminated_in_order():
        if processes <= 1:
            yield map
            return
        reading, writing = os.pipe()
        # Forked, because a new interpreter would first import torch for half a minute; fsspec and
        # pyarrow both start their threads anew in a forked child.
        pool = ProcessPoolExecutor(
            processes,
            mp_context=get_context("fork"),
            initializer=_end_with_parent,
            initargs=(reading, writing),
        )
        try:
            yield partial(pool.map, chunksize=1)
            pool.shutdown()
        except BrokenProcessPool:
            raise WorkerLost(
                "a worker process was killed, most likely because memory ran out: give fewer "
                "processes (-j), and run the same command again to go on"
            ) from None
        finally:
            os.close(writing)  # ends the workers that still work
            pool.shutdown(cancel_futures=True)
            os.close(reading)


def _end_with_parent(reading: int, writing: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent's end of the pipe closes."""
    os.close(writing)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        os.read(reading, 1)  # returns when no process holds the other end
        os._exit(1)

    threading.Thread(target=watch, name="m3i-parent", daemon=True).start()


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit(143), which runs the clean-up of `finally`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # schedulers repeat it while we clean up
        os.write(2, b"stopped by SIGTERM: run the same command again to go on\n")
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
