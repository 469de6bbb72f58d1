"""Which implementation runs: one explicit choice per process, reported once.

    auto       the Triton kernels for CUDA (and ROCm) tensors, the pure-torch reference otherwise
    triton     the Triton kernels, whatever the device; on CPU tensors this needs the interpreter
               (`TRITON_INTERPRET=1` in the environment before the first import)
    reference  the pure-torch reference, whatever the device

Nothing falls back: where the chosen implementation cannot run, the call raises `ValueError`.
"""

import importlib.util
import logging
import os

import torch

BACKENDS = ("auto", "triton", "reference")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)
_choice = "auto"
_reported: set[tuple[str, str]] = set()


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process.

    Args:
        name: `"auto"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: for any other name.
    """
    global _choice
    _check_name(name)
    _choice = name
    _reported.clear()


def active_backend() -> str:
    """Return the process-wide choice: `"auto"`, `"triton"` or `"reference"`."""
    return _choice


def resolve(backend: str, device: torch.device) -> str:
    """Return the implementation (`"triton"` or `"reference"`) for tensors on `device`.

    Args:
        backend: the `backend` argument of an operator; `"auto"` defers to `set_backend`.
        device: where the operator's tensors are.

    Raises:
        ValueError: for an unknown name, or when Triton was chosen and cannot run on `device`.
    """
    _check_name(backend)
    asked = _choice if backend == "auto" else backend
    chosen = asked
    if asked == "auto":
        chosen = "triton" if device.type == "cuda" else "reference"
    if chosen == "triton":
        _check_triton_runs(device)
    if not torch.compiler.is_compiling():
        _report(asked, chosen, device)
    return chosen


def is_interpreted() -> bool:
    """Tell whether Triton kernels run in Triton's CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, but must be one of {', '.join(BACKENDS)}")


def _check_triton_runs(device: torch.device) -> None:
    if not _HAS_TRITON:
        raise ValueError(
            'backend is "triton", but the triton package is not installed: '
            'install triton or choose backend="reference"'
        )
    if device.type != "cuda" and not is_interpreted() and not _computes_shapes_only(device):
        raise ValueError(
            f'backend is "triton", but the tensors are on {device}: move them to a CUDA device, '
            'set TRITON_INTERPRET=1 before starting Python, or choose backend="reference"'
        )


def _computes_shapes_only(device: torch.device) -> bool:
    """Tell whether tensors are meta or fake ones, for which no kernel is started."""
    return device.type == "meta" or torch._guards.active_fake_mode() is not None


def _report(asked: str, chosen: str, device: torch.device) -> None:
    if (asked, chosen) in _reported:
        return
    _reported.add((asked, chosen))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    how = " (interpreted)" if chosen == "triton" and is_interpreted() else ""
    _log.info("m3i_kernels backend: %s -> %s%s on %s", asked, chosen, how, where)
