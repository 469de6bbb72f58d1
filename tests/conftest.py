"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from helpers import small as builders
from m3i_scale.config import Config

if TYPE_CHECKING:
    from helpers.run_folder import FinishedRun
    from m3i_scale.objective.m3i import M3I

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started the tests in the background; programs that they interrupt shall notice.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds of a test by its marker, about: files are given to workers in the order of their sums.
SECONDS = {"slurm": 40.0, "slow": 20.0, "distributed": 10.0}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, or one worker starts a cluster when the other has finished."""
    files: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        files[item.path] += (
            max((SECONDS.get(mark.name, 0.0) for mark in item.iter_markers()), default=0.0) + 0.2
        )
    items.sort(key=lambda item: -files[item.path])  # stable: a file's tests keep their order


@pytest.fixture(autouse=True)
def restored_numerics() -> Iterator[None]:
    """Undo what a test changes in the whole process, so that the order of the tests is free."""
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    precision = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    ):
        yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def small_tree() -> dict[str, Any]:
    """The small configuration as a tree that a test may change."""
    return builders.small_tree()


@pytest.fixture
def small(small_tree: dict[str, Any]) -> Config:
    return Config.model_validate(small_tree)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run, to be read only: a test that writes into its folder copies it."""
    from helpers.run_folder import finished_run

    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def config(finished: FinishedRun) -> Config:
    """The configuration of the finished run."""
    return finished.config


@pytest.fixture(scope="session")
def made(finished: FinishedRun) -> M3I:
    """The networks of the finished run, on the CPU, in fp32."""
    return finished.made
