"""How a process that makes batches for a rank begins."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

import torch

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def begin_worker(_: int) -> None:
    """In a worker, when it begins: one thread, and an end with its rank.

    The workers are the parallelism. One that outlives its killed rank holds copies of that rank's
    connections, so that the other ranks do not notice the death: torch's workers look for their
    parent every 5 s only.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it has died meanwhile
            os._exit(1)
