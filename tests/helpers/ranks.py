"""Runs a function in several processes that form one gloo group, with a time limit.

    results = run_ranks(2, some_function, tmp_path, argument=3)

`some_function(world, folder, **arguments)` must stand at the top of a test module or of a helper;
what it returns (tensors, numbers, nested) comes back as a list with one entry per rank.

The processes, and programs of `start_program`, are forked from a server that has imported what they
need (warm.py): the imports alone take longer than most of the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["helpers.warm"])


@dataclass
class Rank:
    """One process of a group."""

    process: BaseProcess
    output: Path

    @property
    def pid(self) -> int:
        """Process id, and id of the process group that it leads."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; minus the signal's number if one killed it; None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """kill -9, with its children."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.killpg(self.pid, signal.SIGKILL)


def start_ranks(
    ranks: int, function: Callable[..., Any], folder: Path, **arguments: Any
) -> list[Rank]:
    """Start the processes and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    _start_server()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    module = function.__module__, sys.modules[function.__module__].__file__ or ""
    started = []
    for rank in range(ranks):
        variables = where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = folder / f"output-{rank}.txt"
        call = (variables, output, module, function.__name__, folder, arguments)
        process = _FORK.Process(target=_run, args=call)
        process.start()
        started.append(Rank(process, output))
    return started


def start_program(module: str, words: Sequence[str], output: Path, **variables: str) -> Rank:
    """Start what `python -m MODULE WORDS` starts, as a fork; its exit code is the program's."""
    _start_server()
    process = _FORK.Process(target=_program, args=(module, list(words), output, variables))
    process.start()
    return Rank(process, output)


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
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, "\n".join([*outputs, f"exit codes {codes}"])
    return [torch.load(folder / f"result-{r}.pt", weights_only=True) for r in range(ranks)]


def wait_all(processes: list[Rank], time_limit: float) -> list[str]:
    """Wait for all, kill what outlives the limit, and return the outputs."""
    end = time.monotonic() + time_limit
    for rank in processes:
        rank.process.join(max(0.1, end - time.monotonic()))
    late = [rank for rank in processes if rank.returncode is None]
    for rank in late:
        rank.kill()
        rank.process.join()
    outputs = [rank.output.read_text(errors="replace") for rank in processes]
    return [f"{len(late)} ranks killed after {time_limit} s", *outputs] if late else outputs


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_server() -> None:
    """Start the server, if there is none, with the environment that its ranks inherit."""
    before = dict(os.environ)
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [tests, before.get("PYTHONPATH")]))
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=path)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _program(module: str, words: list[str], output: Path, variables: dict[str, str]) -> None:
    _own_session(output)
    launchers = ("SLURM", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    for name in [name for name in os.environ if name.startswith(launchers)]:
        del os.environ[name]
    os.environ.update(variables)
    sys.argv = [module, *words]
    sys.exit(importlib.import_module(module).main())


def _own_session(output: Path) -> None:
    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _run(
    variables: dict[str, str],
    output: Path,
    module: tuple[str, str],
    name: str,
    folder: Path,
    arguments: dict[str, Any],
) -> None:
    """What one process does."""
    _own_session(output)
    os.environ.update(variables)
    torch.set_num_threads(1)
    from m3i_scale.cluster import launch

    world = launch.start("cpu", "fp32", 0, 2.0)
    launch.setup_logging(world.rank)
    result = getattr(_load(*module), name)(world, folder, **arguments)
    torch.save(result, folder / f"result-{world.rank}.pt")
    launch.finish()


def _load(name: str, file: str) -> ModuleType:
    """A helper by its name; a test module, which is in no folder of `sys.path`, by its file."""
    if name.startswith("helpers."):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
