"""Which kernel of DCNv3 runs where Triton was chosen: gathering, or products of matrices.

The rule depends on shapes, dtypes and versions alone, so it can be read off before a run:

    matrix  3 x 3 points with logits, stride 1, padding = dilation, 32 channels per group,
            all tensors bfloat16, a map of 16 to 256 positions (an odd width counts as one more),
            Triton 3.8 or later on an NVIDIA GPU of compute capability 8.0 or later
    gather  everything else

`m3i_kernels.set_dcnv3_algorithm("gather" | "matrix" | "auto")` for the process, or
`dcnv3(..., algorithm=)` for a call, forces either one. A forced matrix kernel that cannot run
raises `ValueError`; nothing falls back. The choice is logged once for each shape.

`dcnv3(..., half_blend=True)` allows the gather kernel to blend corners in the type of x; where it
cannot (`half_obstacle`), it blends in float32, and the log says why.
"""

import importlib
import logging
import re
from typing import NamedTuple

import torch
from torch import Tensor

from m3i_kernels import _backend
from m3i_kernels.dcnv3.geometry import Geometry

ALGORITHMS = ("auto", "gather", "matrix")
MAX_POSITIONS = 256
MIN_POSITIONS = 16  # below, most rows of the smallest tile (32) would be empty
CHANNELS = 32
OLDEST_TRITON = (3, 8)
_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)
_algorithm = "auto"
_reported: set[str] = set()


def set_algorithm(name: str) -> None:
    """Choose the kernel of DCNv3 for the whole process: `"auto"`, `"gather"` or `"matrix"`.

    Raises:
        ValueError: for any other name.
    """
    global _algorithm
    _check_name(name)
    _algorithm = name
    _reported.clear()


def asked(algorithm: str) -> str:
    """Return what a call asks for; `"auto"` defers to `set_algorithm`."""
    _check_name(algorithm)
    return _algorithm if algorithm == "auto" else algorithm


def reported() -> list[str]:
    """Return what has been chosen in this process, one line for each shape, as logged."""
    return sorted(_reported)


class Call(NamedTuple):
    """What the rule depends on.

    Attributes:
        size: (H, W) of the input.
        channels: D = C / G.
        dtypes: of x, offset, mask and center_scale.
        geometry: static parameters of the call.
        mask_is_logits: whether the softmax is fused.
        triton_version: (major, minor).
        capability: compute capability of an NVIDIA GPU, None for any other device.
    """

    size: tuple[int, int]
    channels: int
    dtypes: set[torch.dtype]
    geometry: Geometry
    mask_is_logits: bool
    triton_version: tuple[int, int]
    capability: tuple[int, int] | None


def choose(call: Call) -> str:
    """Return `"matrix"` or `"gather"`."""
    return "gather" if obstacle(call) else "matrix"


def obstacle(call: Call) -> str | None:
    """Say why the matrix kernel cannot run, or return None."""
    geometry, (height, width) = call.geometry, call.size
    positions = height * (width + width % 2)
    if geometry.kernel_size != (3, 3) or geometry.remove_center:
        return "it needs 3 x 3 points"
    if geometry.stride != (1, 1) or geometry.padding != geometry.dilation:
        return "it needs stride 1 and padding = dilation"
    if not call.mask_is_logits:
        return "it needs mask_is_logits=True"
    if call.channels != CHANNELS:
        return f"it needs {CHANNELS} channels per group, not {call.channels}"
    if not MIN_POSITIONS <= positions <= MAX_POSITIONS:
        return f"it needs {MIN_POSITIONS} to {MAX_POSITIONS} positions, not {height} x {width}"
    if call.dtypes != {torch.bfloat16}:
        return "it needs all tensors in bfloat16"
    if call.triton_version < OLDEST_TRITON:
        return "it needs Triton {}.{}, not {}.{}".format(*OLDEST_TRITON, *call.triton_version)
    if call.capability is None or call.capability < _CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability {}.{} or later".format(*_CAPABILITY)
    return None


def resolve(
    algorithm: str,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    geometry: Geometry,
    mask_is_logits: bool,
) -> str:
    """Return `"matrix"` or `"gather"` for these tensors, and log a new choice.

    Raises:
        ValueError: when `algorithm` is `"matrix"` and that kernel cannot run.
    """
    dtypes = {t.dtype for t in (x, offset, mask, center_scale) if t is not None}
    _, H, W, C = x.shape
    reason = obstacle(
        Call(
            size=(H, W),
            channels=C // geometry.groups,
            dtypes=dtypes,
            geometry=geometry,
            mask_is_logits=mask_is_logits,
            triton_version=triton_version(),
            capability=capability_of(x.device),
        )
    )
    if algorithm == "matrix" and reason:
        raise ValueError(
            f'algorithm is "matrix", but that DCNv3 kernel cannot run here: {reason}; '
            'choose algorithm="auto" or "gather"'
        )
    chosen = "gather" if algorithm == "gather" or reason else "matrix"
    why = "as asked" if algorithm != "auto" else reason or "the shape rule allows it"
    _report(f"{_where(H, W, C, geometry.groups)}: {chosen} kernel ({why})")
    return chosen


def half_obstacle(x: Tensor, is_words: bool) -> str | None:
    """Say why the gather kernel cannot blend corners in the type of x, or return None.

    Args:
        x: as the kernel gets it.
        is_words: whether pairs of its channels can be read as 32-bit words.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "x is {}".format(str(x.dtype).removeprefix("torch."))
    if not is_words:
        return "channels of a group, strides or address of x are no multiples of 8 elements"
    capability = capability_of(x.device)
    if _backend.is_interpreted() or (capability is not None and capability >= _CAPABILITY):
        return None
    return "it needs an NVIDIA GPU of compute capability {}.{} or later".format(*_CAPABILITY)


def blends_in_half(x: Tensor, groups: int, is_words: bool) -> bool:
    """Whether a call that allows it blends corners in the type of x; a new answer is logged."""
    reason = half_obstacle(x, is_words)
    _, H, W, C = x.shape
    how = f"in float32 ({reason})" if reason else "in half precision (as asked)"
    _report(f"{_where(H, W, C, groups)}: the gather kernel blends corners {how}")
    return reason is None


def triton_version() -> tuple[int, int]:
    """Return (major, minor) of the installed Triton."""
    numbers = re.match(r"(\d+)\.(\d+)", importlib.import_module("triton").__version__)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None for any other or interpreted device."""
    if device.type != "cuda" or torch.version.hip or _backend.is_interpreted():
        return None
    return torch.cuda.get_device_capability(device)


def _check_name(name: str) -> None:
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm is {name!r}, but must be one of {', '.join(ALGORITHMS)}")


def _where(height: int, width: int, channels: int, groups: int) -> str:
    return f"dcnv3 at {height} x {width}, {channels} channels in {groups} groups"


def _report(line: str) -> None:
    if line not in _reported:
        _reported.add(line)
        _log.info("%s", line)
