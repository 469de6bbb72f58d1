"""Launching the matrix kernels of DCNv3: their tiles, and tensors as they read them."""

import functools
import importlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m3i_kernels.dcnv3.geometry import Geometry

_FAR = 1 << 20  # elements from position to position, so that 32 bits are enough inside an image


class MatrixTiles(NamedTuple):
    """Positions per tile and warps; 32 * NW / P threads (1 or 2) own a position."""

    P: int
    NW: int


def choose_matrix_tiles(pixels: int, backward: bool) -> MatrixTiles:
    """Choose the tile for maps of `pixels` pixels, rows of an even length.

    The fastest on an H100 at 36, 56, 144 and 196 pixels (kernels/README.md). A map between takes
    the tile of the next larger one that was measured, except where tiles of 32 and two warps would
    spill: 16 registers of a thread hold dx of 16 pixels, too many above 208.
    """
    if backward:
        return MatrixTiles(32, 2) if 64 < pixels <= 208 else MatrixTiles(64, 4)
    return MatrixTiles(32, 1) if pixels <= 36 or 64 < pixels <= 144 else MatrixTiles(64, 2)


@functools.cache
def kernels() -> dict[str, Any]:
    """Import Gluon and return the kernels, `forward` and `backward`."""
    forward = importlib.import_module("m3i_kernels.dcnv3.matrix")
    backward = importlib.import_module("m3i_kernels.dcnv3.matrix_backward")
    return {
        "forward": forward.dcnv3_matrix_forward_kernel,
        "backward": backward.dcnv3_matrix_backward_kernel,
    }


def launch_matrix_forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    y: Tensor,
    geometry: Geometry,
    tiles: MatrixTiles | None = None,
) -> None:
    """Run the forward kernel into y (N, H, W, C), contiguous."""
    inputs, scalars, constants = _arguments(tensors, geometry)
    tiles = tiles or choose_matrix_tiles(constants["H"] * constants["WW"], backward=False)
    kernel = kernels()["forward"][(y.shape[0] * geometry.groups,)]
    kernel(*inputs, y, *scalars, **constants, **tiles._asdict(), num_warps=tiles.NW)


def launch_matrix_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    geometry: Geometry,
    tiles: MatrixTiles | None = None,
) -> None:
    """Run the backward kernel; grad and the gradients it writes are contiguous bfloat16."""
    inputs, scalars, constants = _arguments(tensors, geometry)
    tiles = tiles or choose_matrix_tiles(constants["H"] * constants["WW"], backward=True)
    dx, doffset, dmask, dscale = gradients
    kernel = kernels()["backward"][(grad.shape[0] * geometry.groups,)]
    outputs = (dx, doffset.view(torch.int32), dmask, dscale)
    arguments = (aligned(grad), *inputs, *outputs, *scalars)
    kernel(*arguments, **constants, **tiles._asdict(), num_warps=tiles.NW)


def _arguments(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], geometry: Geometry
) -> tuple[tuple[Tensor, ...], tuple[int | float, ...], dict[str, int | bool]]:
    x, offset, mask, center_scale = tensors
    x = aligned(_by_position(x))
    pairs = _as_pairs(_by_position(offset))
    mask = _by_position(mask)
    scale = mask if center_scale is None else _by_position(center_scale)
    _, H, W, C = x.shape
    width = W + W % 2
    constants = {
        "G": geometry.groups,
        "D": C // geometry.groups,
        "H": H,
        "W": W,
        "WW": width,
        "Q": max(64, triton.next_power_of_2(H * width)),
        "KH": geometry.kernel_size[0],
        "KW": geometry.kernel_size[1],
        "DH": geometry.dilation[0],
        "DW": geometry.dilation[1],
        "GATED": center_scale is not None,
    }
    inputs = (x, pairs, mask, scale)
    strides = [s for t in inputs for s in (t.stride(0), t.stride(2))]
    return inputs, (*strides, geometry.offset_scale), constants


def _by_position(t: Tensor) -> Tensor:
    """Copy a tensor only where its positions are not at one stride, its channels neighbours."""
    rows = t.shape[1] == 1 or t.stride(1) == t.shape[2] * t.stride(2)
    if t.stride(3) == 1 and rows and t.stride(2) <= _FAR:
        return t
    return t.contiguous()


def aligned(t: Tensor) -> Tensor:
    """Copy a tensor only where its rows of channels do not start at multiples of 16 bytes."""
    regular = t.stride(0) % 16 == 0 and t.stride(2) % 16 == 0
    if t.data_ptr() % 16 == 0 and regular:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _as_pairs(offset: Tensor) -> Tensor:
    """View offsets (dx, dy) as one int32; copied where pairs do not lie at whole words."""
    even = offset.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in offset.stride()[:3])
    if not even or offset.data_ptr() % 4:
        offset = offset.clone(memory_format=torch.contiguous_format)
    return offset.view(torch.int32)
