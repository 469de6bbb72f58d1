"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from small import SMALL

from m3i_scale.config import Config

os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
    return yaml.safe_load(SMALL)


@pytest.fixture
def small(small_tree: dict[str, Any]) -> Config:
    return Config.model_validate(small_tree)
