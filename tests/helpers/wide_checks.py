"""Run by test_compile.py in its own process, not interpreted: DCNv3 with offsets of 64 bits."""

import importlib
import itertools

import compile_only
import torch
from m3i_kernels.dcnv3.geometry import make_geometry

op = importlib.import_module("m3i_kernels.dcnv3.op")  # the package exports a function of that name
# (dtype, channels of a group, elements from row to row, gate): the stride fits 32 bits or does not
CASES = ((torch.float16, 8, 2**30, False), (torch.bfloat16, 32, 2**31, True))
DIRECTIONS = ("forward", "backward", "deterministic")


def launch(
    dtype: torch.dtype, channels: int, row: int, gated: bool, direction: str
) -> compile_only.Launch:
    """Record one launch on images of more than 2**31 elements, two rows each."""

    def dense(width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(2, 2, 3, width, dtype=kind, device="meta")

    x = torch.empty_strided(
        (2, 2, 3, channels), (2 * row, row, channels, 1), dtype=dtype, device="meta"
    )
    offset, mask, gate = dense(18), dense(9), dense(1) if gated else None
    tensors = (x, offset, mask, gate)
    fixed = direction == "deterministic"
    tiles = op.choose_tiles(channels, 9, direction != "forward", fixed, itemsize=dtype.itemsize)
    geometry = make_geometry(3, 1, 1, 1, 1, 1.0, False)
    with compile_only.record(op) as launches:
        y = dense(channels)
        if direction == "forward":
            op.launch_forward(tensors, y, geometry, True, tiles)
        else:
            unit = torch.empty(1, device="meta") if fixed else None
            dx = dense(channels, torch.int64 if fixed else torch.float32)
            gradients = (dx, offset, mask, y if gate is None else gate)
            op.launch_backward(y, y, tensors, unit, gradients, geometry, True, tiles)
    return launches[0]


if __name__ == "__main__":
    for case, direction in itertools.product(CASES, DIRECTIONS):
        recorded = launch(*case, direction)
        assert recorded.arguments["WIDE"]
        compile_only.compiled_for(recorded, "sm_90")
        print("compiled", *case, direction)
