"""Kernel tests run natively on a CUDA device and in Triton's interpreter without one."""

import os
import sys

import pytest
import torch


def _interpret() -> None:
    """Have every kernel interpreted that is defined from here on.

    Triton decides when a function is decorated. Its own library of functions, `tl.sum` and others,
    was decorated when torch imported Triton, so those are decorated again.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if not torch.cuda.is_available():
    _interpret()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
