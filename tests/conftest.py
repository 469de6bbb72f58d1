"""Fixtures that all tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml
from small import SMALL

from m3i_scale.config import Config

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture
def small_tree() -> dict[str, Any]:
    """The small configuration as a tree that a test may change."""
    return yaml.safe_load(SMALL)


@pytest.fixture
def small(small_tree: dict[str, Any]) -> Config:
    return Config.model_validate(small_tree)
