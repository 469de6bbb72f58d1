"""Part 9: DCNv3 at InternImage-H's stages, every implementation that the kernels' benchmark knows.

    python benchmarks/gpu_session/kernel_bench.py

Shapes, inputs, implementations and checks are those of `kernels/bench/operators.py`; the pure-torch
reference, which takes seconds at this batch, is what the others are checked against and not timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import measure
import operators
import rows
import torch


def bench(
    part: str,
    name: str,
    words: list[str],
    batch: int,
    dtype: torch.dtype,
    only: Sequence[str] = (),
) -> int:
    """Check and time implementations of one operator, all or `only` some, at all problems whose
    name has one of the words; 1 where one failed or disagrees.
    """
    if rows.REHEARSE:
        from helpers.interpreted import interpret

        interpret()
    operator = operators.OPERATORS[name]
    nbytes = 1 << (20 if rows.REHEARSE else 31)
    bandwidth = measure.copy_bandwidth(rows.DEVICE, nbytes)
    rows.write(part, "copy", gb_per_s=bandwidth * 1e-9, bytes=nbytes, ok=True)
    chosen = [p for p in operator.problems(batch, dtype) if any(w in p.name for w in words)]
    if rows.REHEARSE:
        chosen = [_small(p) for p in chosen[-1:]]
    failed = 0
    for problem in chosen:
        for implementation in operator.implementations(problem):
            wanted = implementation in only if only else not implementation.startswith("reference")
            if wanted:
                failed |= _one(part, operator, problem, implementation, batch, bandwidth)
    return failed


def _one(
    part: str,
    operator: operators.Operator,
    problem: operators.Problem,
    name: str,
    batch: int,
    bandwidth: float,
) -> int:
    """Rows of one implementation; whatever goes wrong with it is a row as well."""
    started = time.perf_counter()
    try:
        found = measure.measure(operator, problem, batch, rows.DEVICE, bandwidth, name)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:400]
        rows.write(part, problem.name, implementation=name, ok=False, error=message)
        return 1
    for row in found:
        values = {k: v for k, v in row._asdict().items() if k not in rows.origin()}
        rows.write(part, problem.name, **{**values, "ok": True, "ms": row.ms_p50})
    print(f"{problem.name} {name}: {time.perf_counter() - started:.1f} s", flush=True)
    return 0


def _small(problem: operators.Problem) -> operators.Problem:
    """The same kind of problem at a size that the interpreter takes."""
    small = {"size": 2, "channels": 32, "groups": 2}
    shape = {key: min(value, small.get(key, value)) for key, value in problem.shape.items()}
    return problem._replace(shape=shape, dtype=torch.float32)


def main() -> int:
    """DCNv3 as InternImage-H calls it, 192 pixels."""
    batch = 2 if rows.REHEARSE else 128
    return bench("dcnv3", "dcnv3", ["H 192"], batch, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
