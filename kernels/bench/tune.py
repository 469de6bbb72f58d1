"""Time DCNv3 with other launch parameters than `choose_tiles` picks, on a GPU.

    python kernels/bench/tune.py --problems "H 192 stage 3"

Prints and writes one row per problem, direction and candidate; the shipped one is marked. Nothing
is stored where the library would find it: a better choice is a change of `choose_tiles`.
"""

import argparse
import importlib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import measure
import operators
import tables
import torch
import triton
from m3i_kernels.dcnv3.geometry import make_geometry

dcnv3_op = importlib.import_module("m3i_kernels.dcnv3.op")


class TileTiming(NamedTuple):
    """One candidate; time in milliseconds."""

    problem: str
    direction: str
    tiles: str
    shipped: bool
    ms: float
    fraction_of_copy: float
    device: str
    commit: str


def candidates(channels: int, backward: bool) -> Iterator[Any]:
    """List launch parameters around the shipped ones."""
    width = triton.next_power_of_2(channels)
    per_thread, splits = ((4,), (1, 2, 4)) if backward else ((4, 8, 16), (1, 2))
    grid = itertools.product(splits, (1, 2, 4), (2, 4), (1, 3, 9), per_thread)
    for split, block_g, warps, unroll, elements in grid:
        if width // split < 8 or (backward and unroll == 9):
            continue
        rows = 32 * warps * elements // (width // split)
        if rows >= block_g:
            yield dcnv3_op.Tiles(rows // block_g, block_g, width // split, split, unroll, warps)


def tune(problem: operators.Problem, batch: int, bandwidth: float) -> list[TileTiming]:
    """Time all candidates of one problem in both directions, best first."""
    operator = operators.OPERATORS["dcnv3"]
    inputs = {k: v.detach() for k, v in operator.inputs(problem, batch, "cuda").items()}
    x = inputs["x"]
    y, grad = torch.empty_like(x), torch.randn_like(x)
    geometry = make_geometry(3, 1, 1, 1, problem.shape["groups"], 1.0, False)
    tensors = (x, inputs["offset"], inputs["mask"], inputs.get("center_scale"))
    gradients = (torch.zeros_like(x, dtype=torch.float32), *map(_like, tensors[1:]))
    source = measure.provenance("cuda")
    rows = []
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        channels = x.shape[-1] // problem.shape["groups"]
        shipped = dcnv3_op.choose_tiles(channels, 9, backward, itemsize=x.itemsize)
        nbytes = operator.minimal_bytes(inputs, y.nbytes, direction)
        for tiles in dict.fromkeys((shipped, *candidates(channels, backward))):

            def launch(tiles: Any = tiles, backward: bool = backward) -> None:
                if backward:
                    arguments = (grad, y, tensors, None, gradients, geometry, True, tiles)
                    dcnv3_op.launch_backward(*arguments)
                else:
                    dcnv3_op.launch_forward(tensors, y, geometry, True, tiles)

            ms = triton.testing.do_bench(launch, warmup=5, rep=20, quantiles=[0.5])
            share = nbytes / (ms * 1e-3) / bandwidth
            text = " ".join(f"{k}={v}" for k, v in tiles._asdict().items())
            where = (source["device"], source["commit"])
            rows.append(
                TileTiming(problem.name, direction, text, tiles == shipped, ms, share, *where)
            )
    return sorted(rows, key=lambda r: (r.direction, r.ms))


def _like(tensor: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0, device="cuda") if tensor is None else torch.empty_like(tensor)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--problems", default="H 192 stage 3", help="only those with this in their name"
    )
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing can be tuned.", file=sys.stderr)
        return 2
    bandwidth = measure.copy_bandwidth("cuda")
    rows: list[TileTiming] = []
    for problem in operators.OPERATORS["dcnv3"].problems(options.batch, torch.bfloat16):
        if options.problems in problem.name:
            new = tune(problem, options.batch, bandwidth)
            for direction in ("backward", "forward"):
                best = [r for r in new if r.direction == direction][:3]
                chosen = [r for r in new if r.direction == direction and r.shipped]
                print(tables.markdown([*best, *chosen], TileTiming._fields[:6]), flush=True)
            rows += new
            tables.write_csv(rows, options.out / "tune_dcnv3.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
