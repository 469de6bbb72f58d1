"""Kernel tests run natively on a CUDA device and in Triton's interpreter without one."""

import pytest
import torch

from helpers.interpreted import interpret

if not torch.cuda.is_available():
    interpret()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
