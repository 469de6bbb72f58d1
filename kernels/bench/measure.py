"""Check an implementation, then time it; nothing that fails its check is timed."""

import datetime
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from operators import Implementation, Operator, Problem
from torch import Tensor

_QUANTILES = (0.1, 0.5, 0.9)


class Timing(NamedTuple):
    """One measurement; times in milliseconds, rates in 1e9 bytes per second."""

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
    milliseconds = quantiles(lambda: target.copy_(source), device)[1]
    return 2 * nbytes / (milliseconds * 1e-3)


def quantiles(run: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """Milliseconds of a call: 10 %, median, 90 %; on a CPU of three calls, to rehearse."""
    if device != "cpu":
        p10, p50, p90 = triton.testing.do_bench(run, quantiles=list(_QUANTILES))
        return p10, p50, p90
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - started))
    return min(taken), statistics.median(taken), max(taken)


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


def measure(
    operator: Operator,
    problem: Problem,
    batch: int,
    device: str,
    bandwidth: float,
    only: tuple[str, ...] = (),
) -> list[Timing]:
    """Check and time all implementations of one problem in all directions."""
    rows = []
    source = provenance(device)
    torch._dynamo.reset()  # past a number of recompilations torch.compile would stay eager
    for name, implementation in operator.implementations(problem).items():
        if only and name not in only:
            continue
        error = check(operator, problem, implementation, name, device)
        inputs = operator.inputs(problem, batch, device)
        output = implementation(**inputs)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        written = sum(t.nbytes for t in outputs)
        for direction in operator.directions:
            run = _direction(implementation, inputs, outputs[0], direction)
            p10, p50, p90 = quantiles(run, device)
            nbytes = operator.minimal_bytes(inputs, written, direction)
            rate = nbytes / (p50 * 1e-3)
            rows.append(
                Timing(
                    operator=operator.name,
                    problem=problem.name,
                    batch=batch,
                    dtype=str(problem.dtype).removeprefix("torch."),
                    direction=direction,
                    implementation=name,
                    error=error,
                    ms_p10=p10,
                    ms_p50=p50,
                    ms_p90=p90,
                    minimal_bytes=nbytes,
                    gb_per_s=rate * 1e-9,
                    copy_gb_per_s=bandwidth * 1e-9,
                    fraction_of_copy=rate / bandwidth,
                    **source,
                )
            )
    return rows


def _direction(
    implementation: Implementation, inputs: dict[str, Tensor], output: Tensor, direction: str
) -> Callable[[], Any]:
    leaves = [t for t in inputs.values() if t.requires_grad]
    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return implementation(**inputs)

        return forward
    grad = torch.randn_like(output)
    if direction == "backward":
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(implementation(**inputs), leaves, grad)
