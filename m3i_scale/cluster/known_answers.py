"""Whether a device computes rightly, and as fast as its neighbours: products with known answers.

Factors are random and of -1, 0 and 1, so that every sum is a small integer, exact in bf16 and in
any order. The product C = A B is compared without being computed twice: C x = A (B x) for a random
integer vector x without zeros, on the CPU (Freivalds 1977). It misses no single wrong element.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

SIZE = {"cpu": 256, "cuda": 2048}  # of square matrices; |sums| stay below 256, bf16's exact range
PRODUCTS = {"cpu": 3, "cuda": 50}
BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}  # that are copied
REPEATS = 5


def compute(device: torch.device) -> tuple[str | None, float]:
    """Multiply with known answers; what is wrong, and the seconds of the fastest product.

    Raises:
        RuntimeError: the device cannot compute at all.
    """
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        a, b, expected, vector = _problem(SIZE[device.type], dtype)
        left, right = a.to(device), b.to(device)
        for _ in range(PRODUCTS[device.type]):
            seconds, product = _timed(functools.partial(torch.matmul, left, right), device)
            best = min(best, seconds)
            wrong = int((_apply(product.to("cpu"), vector) != expected).sum())
            if wrong:
                name = str(dtype).removeprefix("torch.")
                return f"{device} multiplies wrongly: {wrong} rows of a {name} product differ", best
    return None, best


def memory(device: torch.device) -> float:
    """Seconds of the fastest copy of `BYTES` within the device's memory."""
    source = torch.ones(BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return min(_timed(lambda: target.copy_(source), device)[0] for _ in range(REPEATS))


def slow(speeds: Mapping[int, Mapping[str, float]], factor: float) -> Iterator[tuple[int, str]]:
    """Ranks that took longer than `factor` times the median of all, and by how much.

    Args:
        speeds: of each rank the seconds, by what was done.
        factor: of the median.
    """
    for what in dict.fromkeys(name for own in speeds.values() for name in own):
        found = {rank: own[what] for rank, own in speeds.items() if what in own}
        usual = statistics.median(found.values())
        for rank, seconds in found.items():
            if seconds > factor * usual:
                yield (
                    rank,
                    (
                        f"rank {rank}: {what} takes {1000 * seconds:.3g} ms, usual here are "
                        f"{1000 * usual:.3g} ms"
                    ),
                )


def _problem(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two factors, and what their product gives with a vector; the same on all ranks."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=draw, dtype=torch.int64) for _ in "ab")
    vector = torch.randint(1, 1 << 16, (size,), generator=draw, dtype=torch.int64)
    return a.to(dtype), b.to(dtype), _apply(a, _apply(b, vector)), vector


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Product with an integer vector: float64 holds all integers that occur here exactly."""
    return matrix.double().mv(vector.double()).long()


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, result
