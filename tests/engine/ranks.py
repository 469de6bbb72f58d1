"""Runs a function in several processes that form one gloo group, with a time limit.

    results = run_ranks(2, some_function, tmp_path, argument=3)

`some_function(world, folder, **arguments)` must stand at the top of an importable test module; what
it returns (tensors, numbers, nested) comes back as a list with one entry per rank.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]

_BOOTSTRAP = """
import importlib, sys, torch
from pathlib import Path
module, name, folder, call = sys.argv[1:5]
sys.path[:0] = sys.argv[5:]
torch.set_num_threads(1)
from m3i_scale.engine import launch
arguments = torch.load(call, weights_only=True)
world = launch.start("cpu", "fp32", 0, 2.0)
launch.speak(world.rank)
result = getattr(importlib.import_module(module), name)(world, Path(folder), **arguments)
torch.save(result, Path(folder) / f"result-{world.rank}.pt")
launch.finish()
"""


def start_ranks(
    ranks: int, function: Callable[..., Any], folder: Path, **arguments: Any
) -> list[subprocess.Popen[str]]:
    """Start the processes and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    call = folder / "arguments.pt"
    torch.save(arguments, call)
    module = Path(sys.modules[function.__module__].__file__ or "")
    command = [
        sys.executable, "-c", _BOOTSTRAP, module.stem, function.__name__,
        str(folder), str(call), str(module.parent), str(TESTS),
    ]  # fmt: skip
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    folder: Path,
    *,
    time_limit: float = 240,
    **arguments: Any,
) -> list[Any]:
    """Run to the end and return each rank's result; fails with the output if a rank fails."""
    processes = start_ranks(ranks, function, folder, **arguments)
    outputs = wait_all(processes, time_limit)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, (
            "\n".join(outputs) + f"\nexit {process.returncode}: {output}"
        )
    return [torch.load(folder / f"result-{r}.pt", weights_only=True) for r in range(ranks)]


def wait_all(processes: list[subprocess.Popen[str]], time_limit: float) -> list[str]:
    """Wait for all, kill what outlives the limit, and return the outputs."""
    end = time.monotonic() + time_limit
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            kill_all(processes)
            outputs.append(f"killed after {time_limit} s\n" + process.communicate()[0])
    return outputs


def kill_all(processes: list[subprocess.Popen[str]]) -> None:
    """kill -9, with the processes' children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
