"""Ranks as forks of one process that has imported everything and computed nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Before torch and deepspeed are imported, here or in a fork.
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")


class Ranks:
    """Processes that form one group by the usual variables; `work` returns their exit code.

    Args:
        count: how many.
        work: what each of them does.
        log: their output is appended to `<log>.rank-<n>.log`.
    """

    def __init__(self, count: int, work: Callable[[], int], log: Path) -> None:
        self.log = log
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.codes: list[int | None] = [None] * count
        self.pids = []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                self._become(rank, meeting | place, work)
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
        return None not in self.codes

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all; whether they ended by themselves. What has not is killed."""
        if wait_for(self.poll, seconds):
            return True
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        wait_for(self.poll, 60)
        return False

    def finish(self, seconds: float) -> None:
        """Wait for the end of all, which must be a good one.

        Raises:
            SystemExit: it was not.
        """
        self.wait(seconds)
        if any(self.codes):
            logs = self.log.parent.glob(f"{self.log.name}.rank-*.log")
            ends = [f"--- {path}\n{path.read_text()[-1500:]}" for path in sorted(logs)]
            raise SystemExit("\n".join([f"exit codes {self.codes}", *ends]))

    def _become(self, rank: int, variables: dict[str, str], work: Callable[[], int]) -> None:
        code = 1
        try:
            os.setsid()
            with open(f"{self.log}.rank-{rank}.log", "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(variables)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds or the time is over; whether it holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
