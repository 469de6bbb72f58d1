"""The least time that a kernel of this library allows itself: issue, L1 or DRAM, whichever is most.

    issue   instructions a thread executes, from the machine code compiled for this device, at 128
            lanes a clock and multiprocessor; a loop counts as often as its trip count says
    L1      bytes that loads, stores and atomic additions name, at 128 bytes a clock
    DRAM    minimal bytes, at the rate of a copy

Branches count as taken, and the clock is the highest that the device states, so a share of this
roofline is an estimate and a little pessimistic where a device runs slower.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import compile_only
import torch
import triton
from torch import Tensor

_LANES, _L1_BYTES = 128, 128
_MODULES = ("m3i_kernels.dcnv3.op", "m3i_kernels.depthwise.op")
DESCRIBED = {
    "dcnv3_forward_kernel",
    "dcnv3_backward_kernel",
    "depthwise_kernel",
    "depthwise_weight_kernel",
    "norm_gelu_kernel",
    "norm_gelu_backward_kernel",
}


def least_ms(
    implementation: Callable[..., Any],
    inputs: dict[str, Tensor],
    direction: str,
    minimal_bytes: int,
    bandwidth: float,
) -> tuple[str, float]:
    """Return (what limits, milliseconds) of all kernels that one call launches.

    `implementation` is called with the launches recorded instead of run. Of what it launches
    beside Triton kernels, such as the conversion of a sum, only the DRAM bytes are in the figure.
    Returns an empty limit and NaN where the launches of this operator are not described.
    """
    launches = _launches(implementation, inputs, direction)
    if not launches or any(x.kernel.__name__ not in DESCRIBED for x in launches):
        return "", float("nan")
    properties = torch.cuda.get_device_properties(0)
    index = torch.cuda.current_device()
    rates = triton.runtime.driver.active.utils.get_device_properties(index)
    per_ms = properties.multi_processor_count * rates["sm_clock_rate"]  # kHz: clocks a millisecond
    target = f"sm_{properties.major}{properties.minor}"
    if target not in compile_only.TARGETS:
        return "", float("nan")
    least = {
        "issue": sum(_threads(x) * _executed(x, target) for x in launches) / _LANES / per_ms,
        "L1": sum(_l1_bytes(x) for x in launches) / _L1_BYTES / per_ms,
        "DRAM": minimal_bytes / bandwidth * 1e3,
    }
    limit = max(least, key=lambda k: least[k])
    return limit, least[limit]


def _launches(
    implementation: Callable[..., Any], inputs: dict[str, Tensor], direction: str
) -> list[compile_only.Launch]:
    with contextlib.ExitStack() as stack:
        lists = [
            stack.enter_context(compile_only.record(importlib.import_module(name)))
            for name in _MODULES
        ]
        output = implementation(**inputs)
        before = [len(recorded) for recorded in lists]
        if direction != "forward":
            leaves = [t for t in inputs.values() if t.requires_grad]
            torch.autograd.grad(output, leaves, torch.zeros_like(output))
    skipped = before if direction == "backward" else [0] * len(lists)
    return [x for recorded, n in zip(lists, skipped, strict=True) for x in recorded[n:]]


def trips(arguments: dict[str, Any], kernel: str) -> float:
    """How often the one loop of a kernel runs, for these arguments."""
    if kernel.startswith("dcnv3"):
        points = arguments["KH"] * arguments["KW"] - arguments["REMOVE_CENTER"]
        return points / (arguments["UNROLL"] if points % arguments["UNROLL"] == 0 else 1)
    if kernel == "depthwise_kernel":
        return arguments["K"]
    if kernel == "depthwise_weight_kernel":
        return arguments["strips"] / arguments["BLOCK_R"] / arguments["SPLITS"]
    if kernel == "norm_gelu_backward_kernel":
        return arguments["rows"] / arguments["BLOCK_R"] / arguments["PROGRAMS"]
    return 1


def instructions_per_result(
    launch: compile_only.Launch, resources: compile_only.Resources
) -> float:
    """Instructions that a thread executes for one element of the result, with all turns of loops.

    Of a weight's gradient, an element of the gradient that it is summed from.
    """
    return _threads(launch) * _repeated(launch, resources) / _results(launch)


def _results(launch: compile_only.Launch) -> float:
    a = launch.arguments
    if launch.kernel.__name__.startswith("dcnv3"):
        return float(a["positions"] * a["G"] * a["D"])
    return float(
        a["p_dz" if launch.kernel.__name__ == "depthwise_weight_kernel" else "p_z"].numel()
    )


def _executed(launch: compile_only.Launch, target: str) -> float:
    return _repeated(launch, _compile(_Hashable(launch), target))


def _repeated(launch: compile_only.Launch, resources: compile_only.Resources) -> float:
    repeated = trips(launch.arguments, launch.kernel.__name__)
    return resources.instructions + (repeated - 1) * resources.in_loops


class _Hashable:
    """A launch that equals another when the compiler sees the same in both."""

    def __init__(self, launch: compile_only.Launch) -> None:
        self.launch = launch
        seen = {
            k: str(v.dtype) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()
        }
        self.key = (launch.kernel.__name__, str(seen), str(launch.options))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.cache
def _compile(launch: _Hashable, target: str) -> compile_only.Resources:
    return compile_only.compile_launch(launch.launch, target)


def _threads(launch: compile_only.Launch) -> float:
    """Threads of a launch; programs as the operators count them."""
    return launch.programs * 32 * launch.options["num_warps"]


def _l1_bytes(launch: compile_only.Launch) -> float:
    """Bytes that the loads, stores and additions of channels name."""
    a, name = launch.arguments, launch.kernel.__name__
    if name.startswith("dcnv3"):
        points = a["KH"] * a["KW"] - a["REMOVE_CENTER"]
        results, size = a["positions"] * a["G"] * a["D"], a["p_mask"].element_size()
        row = a["positions"] * a["G"] * (4 * points + a["GATED"]) * size
        if "p_dx" not in a:
            return results * size * (4 * points + 1 + a["GATED"]) + row
        added = a["p_dx"].element_size()
        rows = 2 * row + a["positions"] * a["G"] * points * size
        return results * (size * (4 * points + 2) + added * (4 * points + a["GATED"])) + rows
    if name == "depthwise_kernel":
        tensor, strip = a["p_z"], a["STRIP"]
        columns = (strip + a["K"] - 1) / strip * a["K"]
        weights = 4 * a["K"] ** 2 / strip
        return tensor.numel() * (tensor.element_size() * (columns + 1) + weights)
    if name == "depthwise_weight_kernel":
        columns = (a["STRIP"] + a["K"] - 1) / a["STRIP"]
        return a["p_dz"].numel() * a["p_dz"].element_size() * a["K"] * (columns + 1)
    return a["p_z"].numel() * a["p_z"].element_size() * (3 if "p_dz" in a else 2)
