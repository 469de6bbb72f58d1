"""The Triton implementation as custom operators of torch, with fake and autograd functions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m3i_kernels._backend import is_interpreted
from m3i_kernels.dcnv3 import choice
from m3i_kernels.dcnv3.geometry import Geometry
from m3i_kernels.dcnv3.kernel import dcnv3_forward_kernel
from m3i_kernels.dcnv3.kernel_backward import dcnv3_backward_kernel
from m3i_kernels.dcnv3.matrix_op import launch_matrix_backward, launch_matrix_forward

_THREADS = 128
_WORDS = {torch.bfloat16: "bf16", torch.float16: "f16"}  # names as in `words.py`
_INT32_MAX = 2**31 - 1


class Tiles(NamedTuple):
    """How one launch is cut up: names as in the kernels."""

    BLOCK_P: int
    BLOCK_G: int
    BLOCK_D: int
    SPLIT: int
    UNROLL: int
    num_warps: int


def choose_tiles(
    channels: int,
    points: int,
    backward: bool,
    deterministic: bool = False,
    warp_size: int = 32,
    itemsize: int = 2,
    half: bool = False,
) -> Tiles:
    """Choose the launch parameters for groups of `channels` channels and `points` points.

    Every thread of a row repeats the arithmetic of its sampling location, so a row gets few threads
    and each of them several channels, in chunks: two in the forward, up to four in the backward.
    There, 4 channels per thread and chunk (2 for the 64-bit sums of the deterministic one) is what
    16-byte vectors hold: with more, every tile would change layout through shared memory before it
    is added. `itemsize` is that of x in bytes; `half` blends corners in the type of x.
    """
    block_d = triton.next_power_of_2(channels)
    split = min(4 if backward else 2, max(1, block_d // (8 if backward else 16)))
    block_d //= split
    per_thread = 2 if deterministic else 4 if backward else 8
    rows = max(1, _THREADS * per_thread // block_d)
    # More would spill in the backward, and for the wider vectors of float32. Blended in float32,
    # nine would take 184 registers; in pairs they take 80.
    unroll = 1
    if points <= 9 and not backward and itemsize == 2:
        unroll = points if half else 3
    return Tiles(rows, 1, block_d, split, unroll, _THREADS // warp_size)


@torch.library.custom_op("m3i_kernels::dcnv3", mutates_args=())
def dcnv3_op(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    mask_is_logits: bool,
    deterministic: bool,
    algorithm: str = "auto",
    half_blend: bool = False,
) -> Tensor:
    """Forward of `m3i_kernels.dcnv3`; arguments already checked."""
    geometry = _geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    N, H, W, C = x.shape
    y = x.new_empty((N, *geometry.output_size(H, W), C))
    inputs = (x, offset, mask, center_scale)
    if choice.resolve(algorithm, *inputs, geometry, mask_is_logits) == "matrix":
        with torch.cuda.device_of(x):
            launch_matrix_forward(inputs, y, geometry)
        return y
    tensors = _unit_channel_stride(x, offset, mask, center_scale)
    x = tensors[0]
    half = half_blend and choice.blends_in_half(x, groups, is_words(x, groups))
    tiles = choose_tiles(
        C // groups,
        geometry.points,
        False,
        warp_size=_warp_size(),
        itemsize=x.itemsize,
        half=half,
    )
    with torch.cuda.device_of(x):
        launch_forward(tensors, y, geometry, mask_is_logits, tiles, half)
    return y


@dcnv3_op.register_fake
def _(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    kernel_size: Sequence[int],
    *_: Any,
) -> Tensor:
    return x.new_empty((x.shape[0], offset.shape[1], offset.shape[2], x.shape[3]))


@torch.library.custom_op("m3i_kernels::dcnv3_backward", mutates_args=())
def dcnv3_backward_op(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    mask_is_logits: bool,
    deterministic: bool,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, mask and center_scale (empty where there is none)."""
    geometry = _geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    grad = grad.contiguous()
    doffset = torch.empty(offset.shape, dtype=offset.dtype, device=x.device)
    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=x.device)
    dscale = _empty_gradient(center_scale, x)
    inputs = (x, offset, mask, center_scale)
    if choice.resolve(algorithm, *inputs, geometry, mask_is_logits) == "matrix":
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            launch_matrix_backward(grad, inputs, (dx, doffset, dmask, dscale), geometry)
        return dx, doffset, dmask, dscale
    tensors = _unit_channel_stride(*inputs)
    unit = _fixed_point_unit(grad, mask, geometry, mask_is_logits) if deterministic else None
    accumulator = torch.int64 if deterministic else torch.float32
    dx = torch.zeros(x.shape, dtype=accumulator, device=x.device)
    channels = x.shape[3] // groups
    tiles = choose_tiles(channels, geometry.points, True, deterministic, _warp_size())
    gradients = (dx, doffset, dmask, dscale)
    with torch.cuda.device_of(x):
        launch_backward(grad, y, tensors, unit, gradients, geometry, mask_is_logits, tiles)
    if unit is not None:
        # by way of float64, whose 53 bits are more than any result keeps
        dx = (dx.double() / unit.double()).to(x.dtype)
    return dx.to(x.dtype), doffset, dmask, dscale


@dcnv3_backward_op.register_fake
def _(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, doffset, dmask = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, offset, mask)
    )
    return dx, doffset, dmask, _empty_gradient(center_scale, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, mask, center_scale, *ctx.parameters = inputs
    ctx.save_for_backward(output, x, offset, mask, center_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at every access
    *parameters, _ = ctx.parameters  # half_blend is of the forward
    dx, doffset, dmask, dscale = dcnv3_backward_op(grad, *saved, *parameters)
    has_scale = saved[4] is not None
    return dx, doffset, dmask, dscale if has_scale else None, *([None] * len(ctx.parameters))


dcnv3_op.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    y: Tensor,
    geometry: Geometry,
    mask_is_logits: bool,
    tiles: Tiles,
    half: bool = False,
) -> None:
    """Run the forward kernel into `y` with the given launch parameters.

    `half` blends corners in the type of x; it needs `is_words`.
    """
    x, offset, mask, center_scale = tensors
    scale = x if center_scale is None else center_scale
    words = is_words(x, geometry.groups) and (half or x.dtype == torch.bfloat16)
    dcnv3_forward_kernel[_grid(y, geometry, tiles)](
        x.view(torch.int32) if words else x,
        offset,
        mask,
        scale,
        y.view(torch.int32) if words else y,
        *_strides(x, offset, mask, scale),
        *_sizes(x, y),
        geometry.offset_scale,
        **_constants(x, offset, geometry, mask_is_logits, center_scale),
        WORDS=_WORDS[x.dtype] if words else "",
        HALF=half,
        PTX=not is_interpreted(),
        **tiles._asdict(),
        enable_fp_fusion=True,
    )


def launch_backward(
    grad: Tensor,
    y: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    unit: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    geometry: Geometry,
    mask_is_logits: bool,
    tiles: Tiles,
) -> None:
    """Run the backward kernel; the first of `gradients` must be zero, int64 with `unit`."""
    x, offset, mask, center_scale = tensors
    scale = x if center_scale is None else center_scale
    _, H, W, C = x.shape
    dcnv3_backward_kernel[_grid(y, geometry, tiles)](
        grad,
        x,
        offset,
        mask,
        scale,
        y,
        grad if unit is None else unit,
        *gradients,
        *_strides(x, offset, mask, scale),
        H * W * C,
        W * C,
        *_sizes(x, y),
        geometry.offset_scale,
        **_constants(x, offset, geometry, mask_is_logits, center_scale),
        FIXED_POINT=unit is not None,
        **tiles._asdict(),
        enable_fp_fusion=True,
    )


def _geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    k, s, p, d = ((pair[0], pair[1]) for pair in (kernel_size, stride, padding, dilation))
    return Geometry(k, s, p, d, groups, offset_scale, remove_center)


def _unit_channel_stride(
    x: Tensor, offset: Tensor, mask: Tensor, center_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Copy only the tensors whose channels are not neighbours in memory."""
    x, offset, mask = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, offset, mask))
    if center_scale is not None and center_scale.stride(-1) != 1:
        center_scale = center_scale.contiguous()
    return x, offset, mask, center_scale


def _empty_gradient(center_scale: Tensor | None, x: Tensor) -> Tensor:
    if center_scale is None:
        return x.new_empty(0)
    return torch.empty(center_scale.shape, dtype=center_scale.dtype, device=x.device)


def _fixed_point_unit(
    grad: Tensor, mask: Tensor, geometry: Geometry, mask_is_logits: bool
) -> Tensor:
    """Units per 1.0, a power of two, in which no sum of contributions to one element overflows.

    Every point of every output position may read the same pixel with its whole weight, and the
    centre blend adds one more contribution. Not finite where the incoming gradient is not, which
    makes the whole gradient of x not finite too.
    """
    largest = grad.abs().amax().float()
    if not mask_is_logits:
        largest = largest * mask.abs().amax().float().clamp(min=1)
    positions = grad.shape[1] * grad.shape[2]
    bound = largest * (positions * geometry.points + 1)
    exponent = (62 - torch.frexp(bound).exponent).clamp(-126, 100)
    return torch.where(bound.isfinite(), torch.ldexp(torch.ones_like(bound), exponent), torch.nan)


def _grid(y: Tensor, geometry: Geometry, tiles: Tiles) -> tuple[int]:
    N, Ho, Wo, _ = y.shape
    tiles_p = triton.cdiv(N * Ho * Wo, tiles.BLOCK_P)
    return (tiles_p * triton.cdiv(geometry.groups, tiles.BLOCK_G),)


def _strides(x: Tensor, offset: Tensor, mask: Tensor, scale: Tensor) -> tuple[int, ...]:
    return *x.stride()[:3], *offset.stride()[:3], *mask.stride()[:3], *scale.stride()[:3]


def _sizes(x: Tensor, y: Tensor) -> tuple[int, ...]:
    N, Ho, Wo, _ = y.shape
    return x.shape[1], x.shape[2], Ho, Wo, N * Ho * Wo


def _constants(
    x: Tensor,
    offset: Tensor,
    geometry: Geometry,
    mask_is_logits: bool,
    center_scale: Tensor | None,
) -> dict[str, int | bool]:
    _, H, W, C = x.shape
    extent = max(H * x.stride(1) + W * x.stride(2) + C, H * W * C + C)
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return {
        "G": geometry.groups,
        "D": C // geometry.groups,
        **dict(zip(names, sum(geometry[:4], ()), strict=True)),
        "REMOVE_CENTER": geometry.remove_center,
        "LOGITS": mask_is_logits,
        "GATED": center_scale is not None,
        "WIDE": extent > _INT32_MAX,
        "PAIRED": _is_paired(offset),
    }


def is_words(x: Tensor, groups: int) -> bool:
    """Whether channels are pairs of 16-bit numbers that 16-byte vectors of words may read."""
    if x.dtype not in _WORDS or x.data_ptr() % 16 != 0:
        return False
    return all(n % 8 == 0 for n in (*x.stride()[:3], x.shape[-1] // groups))


def _is_paired(offset: Tensor) -> bool:
    """Whether every (dx, dy) lies where one load of twice the size may read it."""
    strides = offset.stride()[:3]
    return offset.data_ptr() % (2 * offset.itemsize) == 0 and all(s % 2 == 0 for s in strides)


def _warp_size() -> int:
    return 64 if torch.version.hip else 32
