"""Inputs run in forked children: a crash, a hang or a memory bomb costs one of them.

A child stops itself after `CPU_SECONDS` of processor time on one input, by a timer of the kernel
that needs no Python; one that waits is killed after `WALL_SECONDS`. Its address space is limited.
The memory of an input is the growth of the largest resident size over what it was before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fuzzing.damage import MIB, Random, Violation

CPU_SECONDS, WALL_SECONDS = 10.0, 300.0
ADDRESS_SPACE = 6 << 30  # above what the child has when it starts


class Kind(NamedTuple):
    """One kind of damage."""

    name: str
    run: Callable[[Random, Path], str]
    bound: int  # bytes of memory that an input of it may take


class Result(NamedTuple):
    """What one input came to."""

    number: int
    kind: str
    outcome: str  # of `damage`, or the kind of a violation: "crash", "hang", "memory", ...
    words: str
    peak: int  # bytes
    seconds: float  # of processor time


class Child(NamedTuple):
    """A forked process and what it is at."""

    process: BaseProcess
    pipe: Connection
    number: int
    since: float


def run_all(
    kinds: list[Kind], numbers: Iterable[int], seed: int, children: int, folder: Path
) -> Iterator[Result]:
    """Run inputs, number n being of kind n modulo their count; results as they come."""
    context = multiprocessing.get_context("fork")
    waiting, busy = iter(numbers), list[Child]()

    def start() -> tuple[BaseProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, kinds, seed, folder), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def give(process: BaseProcess, pipe: Connection) -> None:
        number = next(waiting, None)
        if number is None:
            pipe.send(None)
            process.join()
            return
        pipe.send(number)
        busy.append(Child(process, pipe, number, time.monotonic()))

    for _ in range(children):
        give(*start())
    while busy:
        ready = wait([child.pipe for child in busy], timeout=5)
        for child in [*busy]:
            late = time.monotonic() - child.since > WALL_SECONDS
            if child.pipe not in ready and not late:
                continue
            busy.remove(child)
            result = _receive(child, kinds)
            yield result
            alive = child.process.is_alive() and not late
            give(*((child.process, child.pipe) if alive else start()))


def _receive(child: Child, kinds: list[Kind]) -> Result:
    """The child's answer, or how it ended without one."""
    try:
        if child.pipe.poll():
            found: Result = child.pipe.recv()
            return found
    except (EOFError, OSError):
        pass
    if child.process.exitcode is None:
        child.process.join(5)
    code = child.process.exitcode
    if code is None:
        child.process.kill()
        child.process.join()
    kind = kinds[child.number % len(kinds)].name
    hang = code is None or code == -signal.SIGPROF
    words = "too slow" if hang else f"the process ended with {code}"
    return Result(child.number, kind, "hang" if hang else "crash", words, 0, 0.0)


def _serve(pipe: Connection, kinds: list[Kind], seed: int, folder: Path) -> None:
    """A child's life: one number after the other."""
    own = folder / str(os.getpid())
    own.mkdir(parents=True)
    with open(own / "output.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        number = pipe.recv()
        if number is None:
            os._exit(0)
        pipe.send(run_one(kinds[number % len(kinds)], number, seed, own))


def run_one(kind: Kind, number: int, seed: int, folder: Path) -> Result:
    """One input in this process."""
    rng = np.random.default_rng([seed, number])
    if kind.name not in _warm:
        _warm.add(kind.name)
        with contextlib.suppress(Exception):
            kind.run(np.random.default_rng(0), folder)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size begins anew
    before, begun = _status("VmRSS"), time.process_time()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        outcome, words = kind.run(rng, folder), ""
    except Violation as found:
        outcome, words = found.kind, found.words
    except MemoryError as error:
        outcome, words = "memory", f"MemoryError: {error}"
    except Exception as error:
        outcome, words = "traceback", f"{type(error).__name__}: {error}"[:300]
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - begun
    peak = max(0, _status("VmHWM") - before)
    if peak > kind.bound and outcome in ("unharmed", "named", "refused"):
        outcome, words = "memory", f"{peak / MIB:.0f} MiB, allowed are {kind.bound / MIB:.0f}"
    return Result(number, kind.name, outcome, words, peak, seconds)


_warm: set[str] = set()  # kinds whose libraries and fixtures are loaded


def _status(name: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
