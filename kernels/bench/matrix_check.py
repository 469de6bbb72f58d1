"""Are the matrix kernels of DCNv3 right on this GPU, and how fast beside the gather kernels?

    python kernels/bench/matrix_check.py                    # on a GPU, Triton 3.8 or later
    python kernels/bench/matrix_check.py --compile FOLDER   # without a GPU, Triton 3.8 or later
    python kernels/bench/matrix_check.py --cubins FOLDER    # on an sm_90 GPU, any Triton
    python kernels/bench/matrix_check.py --static           # without a GPU, Triton 3.8 or later

InternImage-H's stages 3 and 4 at 192 and 224 pixels in bfloat16, with gate. One JSON object a line:
first the errors (||found - expected|| / ||expected|| against float64, outputs filled with NaN
before) for offsets of one pixel and of eight, then medians in milliseconds with the L2 cache
flushed, and shares of a device copy's bandwidth. It stops by itself after --seconds, and exits
with 1 where an error is above the limit. `--problems` restricts `--static` alone.
"""

import argparse
import functools
import importlib
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cubins
import torch
import triton
from m3i_kernels.dcnv3 import matrix_op
from m3i_kernels.dcnv3.geometry import make_geometry
from m3i_kernels.dcnv3.matrix_op import MatrixTiles
from m3i_kernels.dcnv3.reference import dcnv3_reference
from torch import Tensor

op = importlib.import_module("m3i_kernels.dcnv3.op")  # the package exports a function of that name

D, K = 32, 9
LIMIT = 5e-3  # rounding to bfloat16 alone is 1.7e-3
PROBLEMS = {"192 stage 3": (12, 40), "192 stage 4": (6, 80), "224 stage 3": (14, 40),
            "224 stage 4": (7, 80)}  # fmt: skip
FORWARD_TILES = [MatrixTiles(*t) for t in ((32, 1), (32, 2), (64, 2), (64, 4))]
BACKWARD_TILES = [MatrixTiles(*t) for t in ((32, 2), (64, 4), (64, 2))]
NAMES = {"forward": ("y",), "backward": ("dx", "doffset", "dmask", "dgate")}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def tiles_of(direction: str) -> list[MatrixTiles]:
    """List the tiles to try."""
    return FORWARD_TILES if direction == "forward" else BACKWARD_TILES


def geometry_of(groups: int) -> Any:
    """Return the geometry of all problems: 3 x 3, stride 1, padding 1."""
    return make_geometry(3, 1, 1, 1, groups, 1.0, False)


def make_inputs(
    batch: int, size: int, groups: int, spread: float, device: str
) -> tuple[Inputs, Tensor]:
    """Draw x, offset, mask, gate and the incoming gradient."""

    def normal(channels: int) -> Tensor:
        shape = (batch, size, size, channels)
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    offset = spread * normal(groups * K * 2)
    offset += 0.25 * (offset == offset.round())  # gradients are one-sided at whole pixels
    gate = normal(groups).sigmoid()
    inputs = (normal(groups * D), offset, 2 * normal(groups * K), gate)
    return inputs, normal(groups * D)


def launch(
    direction: str, inputs: Inputs, grad: Tensor, groups: int, tiles: MatrixTiles | None
) -> tuple[Tensor, ...]:
    """Run one direction with outputs that hold NaN before."""
    if direction == "forward":
        y = torch.full_like(grad, torch.nan)
        matrix_op.launch_matrix_forward(inputs, y, geometry_of(groups), tiles)
        return (y,)
    x, offset, mask, gate = (torch.full_like(t, torch.nan) for t in inputs)
    gradients = x, offset, mask, gate
    matrix_op.launch_matrix_backward(grad, inputs, gradients, geometry_of(groups), tiles)
    return gradients


def exact(inputs: Inputs, grad: Tensor, groups: int) -> dict[str, tuple[Tensor, ...]]:
    """Output and gradients of the reference in float64."""
    leaves = [t.double().requires_grad_() for t in inputs]
    x, offset, mask, gate = leaves
    y = dcnv3_reference(x, offset, mask, geometry_of(groups), True, gate)
    return {
        "forward": (y.detach(),),
        "backward": torch.autograd.grad(y, leaves, grad.double()),
    }


def check(batch: int, device: str, most_groups: int = 80) -> Iterator[dict[str, Any]]:
    """Compare every tile with the reference."""
    for name, (size, groups) in PROBLEMS.items():
        groups = min(groups, most_groups)
        for spread in (1.0, 8.0):
            inputs, grad = make_inputs(batch, size, groups, spread, device)
            expected = exact(inputs, grad, groups)
            for direction, names in NAMES.items():
                for tiles in tiles_of(direction):
                    found = launch(direction, inputs, grad, groups, tiles)
                    again = launch(direction, inputs, grad, groups, tiles)
                    errors = {
                        n: ((f.double() - e).norm() / e.norm()).item()
                        for n, f, e in zip(names, found, expected[direction], strict=True)
                    }
                    yield {
                        "check": name,
                        "direction": direction,
                        **tiles._asdict(),
                        "offsets": spread,
                        "errors": {n: float(f"{e:.2g}") for n, e in errors.items()},
                        "repeats": all(map(torch.equal, found, again)),
                        "right": all(e < LIMIT for e in errors.values()),
                    }


def check_limits(device: str) -> Iterator[dict[str, Any]]:
    """Values that are not finite: loud where documented, and without effect elsewhere."""
    size, groups = list(PROBLEMS.values())[-1]
    inputs, grad = make_inputs(2, size, groups, 1.0, device)
    x, offset, mask, gate = inputs

    def run(changed: Inputs) -> tuple[Tensor, ...]:
        runs = (launch(d, changed, grad, groups, None) for d in NAMES)
        return tuple(t for outputs in runs for t in outputs)

    y, dx, *_ = run(inputs)
    for name, tensor, value in (
        ("logit", mask, torch.nan), ("logit", mask, torch.inf), ("gate", gate, 1.5)
    ):  # fmt: skip
        before = tensor[1, 2, 3, 0].item()
        tensor[1, 2, 3, 0] = value
        y2, dx2, doffset2, *_ = run(inputs)
        tensor[1, 2, 3, 0] = before
        loud = (y2[1, 2, 3, :D], doffset2[1, 2, 3, : 2 * K], dx2[1, ..., :D])
        right = all(bool(t.isnan().all()) for t in loud)
        y2[1, 2, 3, :D], dx2[1, ..., :D] = y[1, 2, 3, :D], dx[1, ..., :D]
        yield {"limit": f"{name} {value}", "right": right and y2.equal(y) and dx2.equal(dx)}
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        found = run((x, torch.full_like(offset, value), mask, torch.zeros_like(gate)))
        yield {"limit": f"offset {value}", "right": not any(bool(t.any()) for t in found[:4])}


def median_ms(run: Callable[[], object], flush: Tensor, repeats: int = 15) -> float:
    """Median time of a call on the GPU, the L2 cache flushed before each."""
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def gather(
    direction: str, inputs: Inputs, grad: Tensor, groups: int
) -> tuple[Callable[[], object], Tensor]:
    """Return the gather kernel of one direction as a call, and the output y."""
    geometry = geometry_of(groups)
    y = torch.empty_like(grad)
    tiles = op.choose_tiles(D, K, backward=False)
    op.launch_forward(inputs, y, geometry, True, tiles)
    if direction == "forward":
        return lambda: op.launch_forward(inputs, y, geometry, True, tiles), y
    dx = torch.zeros(grad.shape, device=grad.device)
    gradients = (dx, *(torch.empty_like(t) for t in inputs[1:]))
    tiles = op.choose_tiles(D, K, backward=True)

    def backward() -> Tensor:
        dx.zero_()
        op.launch_backward(grad, y, inputs, None, gradients, geometry, True, tiles)
        return dx.bfloat16()

    return backward, y


def bytes_moved(direction: str, inputs: Inputs) -> int:
    """Each input read once and each result written once."""
    read = sum(t.nbytes for t in inputs)
    x = inputs[0].nbytes
    return read + x if direction == "forward" else 2 * read + x


def copy_bandwidth(flush: Tensor) -> float:
    """Bytes read plus bytes written per second of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), flush) * 1e3


def measure(batch: int) -> Iterator[dict[str, Any]]:
    """Time every tile beside the gather kernels and a device copy."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    copy = copy_bandwidth(flush)
    yield {"copy_gb_per_s": round(copy * 1e-9), "device": torch.cuda.get_device_name(),
           "torch": torch.__version__, "triton": triton.__version__, "batch": batch}  # fmt: skip
    for name, (size, groups) in PROBLEMS.items():
        inputs, grad = make_inputs(batch, size, groups, 1.0, "cuda")
        for direction in NAMES:
            row = functools.partial(
                timing_row, name, direction, bytes_moved(direction, inputs), copy
            )
            for tiles in tiles_of(direction):
                run = timed(direction, inputs, grad, groups, tiles)
                ms = median_ms(run, flush)
                kernel = matrix_op.kernels()[direction]
                cubin = isinstance(kernel, cubins.Kernel)
                more = {"blocks_per_sm": kernel.blocks_per_sm()} if cubin else {}
                yield row("matrix", ms, **tiles._asdict(), **more)
            run, y = gather(direction, inputs, grad, groups)
            yield row("gather", median_ms(run, flush))
            if direction == "forward":
                found = launch(direction, inputs, grad, groups, None)[0]
                error = ((found.float() - y.float()).norm() / y.float().norm()).item()
                right = error < LIMIT
                yield {"check": name, "batch": batch, "against gather": error, "right": right}


def timing_row(
    name: str, direction: str, moved: int, copy: float, kernel: str, ms: float, **more: Any
) -> dict[str, Any]:
    """Return one timing with its share of the copy's bandwidth."""
    row = {"time": name, "direction": direction, "kernel": kernel, **more, "ms": round(ms, 4)}
    return {**row, "share_of_copy": round(moved / (ms * 1e-3) / copy, 3)}


def timed(
    direction: str, inputs: Inputs, grad: Tensor, groups: int, tiles: MatrixTiles
) -> Callable[[], object]:
    """Return one direction as a call that allocates nothing."""
    geometry = geometry_of(groups)
    if direction == "forward":
        y = torch.empty_like(grad)
        return lambda: matrix_op.launch_matrix_forward(inputs, y, geometry, tiles)
    dx, doffset, dmask, dgate = (torch.empty_like(t) for t in inputs)
    gradients = dx, doffset, dmask, dgate
    return lambda: matrix_op.launch_matrix_backward(grad, inputs, gradients, geometry, tiles)


def static_rows(names: list[str], targets: list[str]) -> Iterator[dict[str, Any]]:
    """Compile the shipped tiles and read the machine code; nothing here needs a GPU."""
    import compile_only  # needs Triton 3.8

    for name in names:
        size, groups = PROBLEMS[name]
        inputs, grad = make_inputs(128, size, groups, 1.0, "meta")
        for direction in NAMES:
            with compile_only.record_matrix() as launches:
                launch(direction, inputs, grad, groups, None)
            constants = launches[0].arguments
            P, warps = constants["P"], constants["NW"]
            for target in targets:
                compiled = compile_only.compiled_for(launches[0], target)
                found = compile_only.read_cubin(compiled)
                trips = -(-size * size // P)
                issued = compile_only.executed_instructions(compiled.asm["cubin"], trips)
                per_result = issued * warps * 32 / (size * size * D)
                yield {"static": name, "direction": direction, "target": target, "P": P,
                       "NW": warps, "registers": found.registers,
                       "spilled_bytes": found.spilled_bytes, "shared_bytes": found.shared_bytes,
                       "instructions_per_result": round(per_result, 1)}  # fmt: skip


def compile_all(folder: pathlib.Path) -> None:
    """Compile all problems and tiles for sm_90."""
    import compile_only

    with compile_only.record_matrix() as launches:
        for size, groups in PROBLEMS.values():
            inputs, grad = make_inputs(128, size, groups, 1.0, "meta")
            for direction in NAMES:
                for tiles in tiles_of(direction):
                    launch(direction, inputs, grad, groups, tiles)
    cubins.save(launches, folder)


def main() -> int:
    """Run the checks and timings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--cubins", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--static", action="store_true", help="read the machine code")
    parser.add_argument("--problems", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--batch", type=int, default=128, help="images of a timing")
    parser.add_argument("--seconds", type=float, default=55.0, help="stop after this long")
    options = parser.parse_args()
    if options.compile:
        compile_all(options.compile)
        return 0
    if options.static:
        for row in static_rows(options.problems, ["sm_80", "sm_90", "sm_100"]):
            print(json.dumps(row), flush=True)
        return 0
    started = time.monotonic()
    if not torch.cuda.is_available():
        print("matrix_check.py needs a CUDA device; --compile FOLDER does not", file=sys.stderr)
        return 2
    if options.cubins:
        torch.zeros(1, device="cuda")
        cubins.install(options.cubins)
    right = True
    torch.manual_seed(0)
    for rows in (check(2, "cuda"), check_limits("cuda"), measure(options.batch)):
        for row in rows:
            right = right and row.get("right", True) and row.get("repeats", True)
            print(json.dumps(row), flush=True)
            if time.monotonic() - started > options.seconds:
                print(json.dumps({"stopped": "time is up"}), flush=True)
                return 0 if right else 1
    print(json.dumps({"all_right": right, "seconds": round(time.monotonic() - started, 1)}))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
