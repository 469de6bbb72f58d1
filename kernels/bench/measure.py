"""Check an implementation, then time it; nothing that fails its check is timed.

Each call of a timing takes the next of several sets of inputs, together larger than the L2 cache.
All calls are put into the queue behind a pause of the device, so that the events around each of
them see the device work without waiting for Python; medians are reported.
"""

import datetime
import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import roofline
import torch
import triton
from operators import Implementation, Operator, Problem
from torch import Tensor
from torch._functorch import config as functorch_config

functorch_config.donated_buffer = False  # a backward is timed many times over one forward

_CALLS = 30
_MAX_SETS = 16


class Timing(NamedTuple):
    """One measurement; times in milliseconds, rates in 1e9 bytes per second.

    `roofline_ms` is the least time that issue, L1 or DRAM allow (`roofline.py`), `limit` says which
    of them; both only where a kernel of this library ran. `failed` says why there is no time.
    """

    operator: str
    problem: str
    batch: int
    dtype: str
    direction: str
    implementation: str
    error: float
    ms_p10: float
    ms_p50: float
    ms_p90: float
    minimal_bytes: int
    gb_per_s: float
    copy_gb_per_s: float
    fraction_of_copy: float
    limit: str
    roofline_ms: float
    fraction_of_roofline: float
    base_ms_p50: float
    speedup: float
    failed: str
    device: str
    torch: str
    triton: str
    commit: str
    date: str


class CheckError(RuntimeError):
    """An implementation disagrees with the reference."""


def copy_bandwidth(device: str, nbytes: int = 1 << 30) -> float:
    """Bytes read plus bytes written per second of a large device-to-device copy."""
    source = torch.randint(0, 256, (nbytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    if device == "cpu":  # to rehearse
        return 2 * nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(3))
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * nbytes / (milliseconds * 1e-3)


@functools.cache
def provenance(device: str) -> dict[str, str]:
    """Device, versions and commit, for every row; `$M3I_COMMIT` in a copy without history."""
    folder = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("M3I_COMMIT") or git("rev-parse", "--short=12", "HEAD") + changed,
        "date": datetime.date.today().isoformat(),
    }


def check(
    operator: Operator, problem: Problem, implementation: Implementation, name: str, device: str
) -> float:
    """Return the largest relative error of outputs and gradients against float64, for two images.

    Raises:
        CheckError: where it exceeds the operator's tolerance or a result is not finite.
    """
    torch.manual_seed(0)
    inputs = operator.inputs(problem, 2, device)
    found = _results(implementation, inputs)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.requires_grad else v
        for k, v in inputs.items()
    }
    expected = _results(operator.reference(problem), exact)
    errors = [_error(f, e) for f, e in zip(found, expected, strict=True)]
    worst = max(errors)
    if not worst <= operator.tolerance(problem.dtype) or any(e != e for e in errors):
        raise CheckError(
            f"{operator.name} {name} on {problem.name}: relative errors {errors} exceed "
            f"{operator.tolerance(problem.dtype)}: not timed"
        )
    return worst


def _results(implementation: Implementation, inputs: dict[str, Tensor]) -> list[Tensor]:
    output = implementation(**inputs)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    leaves = [t for t in inputs.values() if t.requires_grad]
    if not leaves:
        return outputs
    torch.manual_seed(1)
    grad = torch.randn(outputs[0].shape, device=outputs[0].device).to(torch.bfloat16)
    gradients = torch.autograd.grad(outputs[0], leaves, grad.to(outputs[0].dtype))
    return [outputs[0].detach(), *gradients]


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


class Timer:
    """One implementation of one problem, checked, with its sets of inputs in memory."""

    def __init__(
        self, operator: Operator, problem: Problem, batch: int, name: str, device: str
    ) -> None:
        self.device = device
        self.implementation = operator.implementations(problem)[name]
        self.error = check(operator, problem, self.implementation, name, device)
        torch.manual_seed(0)
        self.inputs = [operator.inputs(problem, batch, device)]
        size = sum(t.nbytes for t in self.inputs[0].values())
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
        sets = min(_MAX_SETS, max(2, -(-2 * cache // size)))
        self.inputs += [operator.inputs(problem, batch, device) for _ in range(sets - 1)]
        output = self.implementation(**self.inputs[0])
        self.output_bytes = sum(
            t.nbytes for t in ([output] if isinstance(output, Tensor) else output)
        )

    def milliseconds(self, direction: str) -> list[float]:
        """Time `_CALLS` calls, one after the other on the device."""
        calls = [_direction(self.implementation, tensors, direction) for tensors in self.inputs]
        for call in calls:  # the first calls compile
            call()
        if self.device == "cpu":
            return [_seconds(call) * 1e3 for call in calls]
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize(self.device)
        host = (time.perf_counter() - started) / len(calls) * _CALLS
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_CALLS)
        ]
        torch.cuda._sleep(int(min(host, 0.5) * clock_hz(self.device)))
        for (start, end), call in zip(events, itertools.cycle(calls), strict=False):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def clock_hz(device: str) -> float:
    """Highest clock of the device's processors, Hz."""
    index = torch.device(device).index or torch.cuda.current_device()
    utilities = triton.runtime.driver.active.utils
    return float(utilities.get_device_properties(index)["sm_clock_rate"]) * 1e3


def measure(
    operator: Operator,
    problem: Problem,
    batch: int,
    device: str,
    bandwidth: float,
    name: str,
    base: Callable[[str], Sequence[float]] | None = None,
) -> list[Timing]:
    """Check and time one implementation of one problem in all directions.

    `base(direction)` times the same in another checkout; the two take turns, twice each.
    """
    torch._dynamo.reset()  # past a number of recompilations torch.compile would stay eager
    timer = Timer(operator, problem, batch, name, device)
    rows = []
    for direction in operator.directions:
        times = list(timer.milliseconds(direction))
        base_times: list[float] = []
        if base is not None:
            base_times += base(direction)
            times += timer.milliseconds(direction)
            base_times += base(direction)
        p10, *_, p90 = statistics.quantiles(times, n=10)
        p50 = statistics.median(times)
        base_p50 = statistics.median(base_times) if base_times else float("nan")
        nbytes = operator.minimal_bytes(timer.inputs[0], timer.output_bytes, direction)
        rate = nbytes / (p50 * 1e-3)
        limit, least = "", float("nan")
        if name.startswith("triton"):
            try:
                limit, least = roofline.least_ms(
                    timer.implementation, timer.inputs[0], direction, nbytes, bandwidth
                )
            except Exception as error:  # the time is right all the same
                print(f"no roofline for {name} on {problem.name}: {error!r}", file=sys.stderr)
        rows.append(
            _row(operator, problem, batch, name, direction, device)._replace(
                error=timer.error,
                ms_p10=p10,
                ms_p50=p50,
                ms_p90=p90,
                minimal_bytes=nbytes,
                gb_per_s=rate * 1e-9,
                copy_gb_per_s=bandwidth * 1e-9,
                fraction_of_copy=rate / bandwidth,
                limit=limit,
                roofline_ms=least,
                fraction_of_roofline=least / p50,
                base_ms_p50=base_p50,
                speedup=base_p50 / p50,
            )
        )
    return rows


def failure(
    operator: Operator, problem: Problem, batch: int, name: str, device: str, error: BaseException
) -> Timing:
    """A row that says in one sentence why an implementation was not timed."""
    sentence = " ".join(str(error).split())[:300] or "no message"
    row = _row(operator, problem, batch, name, "", device)
    return row._replace(failed=f"{type(error).__name__}: {sentence}")


def _row(
    operator: Operator, problem: Problem, batch: int, name: str, direction: str, device: str
) -> Timing:
    nan = float("nan")
    return Timing(
        operator=operator.name,
        problem=problem.name,
        batch=batch,
        dtype=str(problem.dtype).removeprefix("torch."),
        direction=direction,
        implementation=name,
        error=nan,
        ms_p10=nan,
        ms_p50=nan,
        ms_p90=nan,
        minimal_bytes=0,
        gb_per_s=nan,
        copy_gb_per_s=nan,
        fraction_of_copy=nan,
        limit="",
        roofline_ms=nan,
        fraction_of_roofline=nan,
        base_ms_p50=nan,
        speedup=nan,
        failed="",
        **provenance(device),
    )


def _direction(
    implementation: Implementation, inputs: dict[str, Tensor], direction: str
) -> Callable[[], Any]:
    leaves = [t for t in inputs.values() if t.requires_grad]
    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return implementation(**inputs)

        return forward
    output = implementation(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    grad = torch.randn_like(output)
    if direction == "backward":
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(implementation(**inputs), leaves, grad)
