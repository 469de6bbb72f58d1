"""The Triton implementation as two custom operators of torch: convolution, LayerNorm with GELU.

Two and not one: the backward needs the convolution's result, so a fused forward would write it
too and save one read of it (6 instead of 8 bytes a value in bfloat16); in exchange every program
would hold all channels of its strips. At InternImage-H's widths (5 * 2^n) that leaves three eighths
of the lanes idle in the convolution, which instructions limit (60 a value, against 54 for the rest,
on sm_90).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m3i_kernels.depthwise.kernel import (
    depthwise_kernel,
    depthwise_weight_kernel,
    norm_gelu_backward_kernel,
    norm_gelu_kernel,
)

_THREADS = 128


class ConvTiles(NamedTuple):
    """How a convolution is cut up: names as in the kernels."""

    STRIP: int
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


class NormTiles(NamedTuple):
    """How a normalisation is cut up: names as in the kernels."""

    BLOCK_R: int
    BLOCK_C: int
    TAIL: int
    num_warps: int


def choose_conv_tiles(channels: int, itemsize: int, warp_size: int = 32) -> ConvTiles:
    """Choose launch parameters: 16-byte vectors of channels per thread, strips of 4 columns."""
    per_thread = 16 // itemsize
    block_c = min(64, triton.next_power_of_2(channels))
    rows = max(1, _THREADS * per_thread // block_c)
    return ConvTiles(4, rows, block_c, _THREADS // warp_size)


def choose_norm_tiles(channels: int, warp_size: int = 32) -> NormTiles:
    """Choose launch parameters: rows of two tiles, about 8 values of the first per thread."""
    block_c = 1 << (channels.bit_length() - 1)
    tail = triton.next_power_of_2(channels - block_c) if channels > block_c else 0
    threads = min(1024, max(_THREADS, block_c // 8))
    return NormTiles(max(1, 8 * threads // block_c), block_c, tail, threads // warp_size)


@torch.library.custom_op("m3i_kernels::depthwise_conv", mutates_args=())
def depthwise_conv_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve x (N, H, W, C) with weight (C, 1, K, K), zeros outside; arguments checked."""
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch_conv(_unit_channel_stride(x), _taps_first(weight), bias, z)
    return z


@depthwise_conv_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("m3i_kernels::depthwise_conv_backward", mutates_args=())
def depthwise_conv_backward_op(
    dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the same bits in every run."""
    dz, x = dz.contiguous(), _unit_channel_stride(x)
    C, _, K, _ = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    splits = _splits(x, K)
    partial = torch.empty((splits, K * K + 1, C), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch_conv(dz, _taps_first(weight.flip(2, 3)), None, dx)
        launch_weight(x, dz, partial, K)
    # Summed one by one: the results of a custom operator must not share memory.
    dweight = partial[:, : K * K].sum(0).t().reshape(weight.shape).to(weight.dtype)
    return dx, dweight, partial[:, K * K].sum(0).to(bias.dtype)


@depthwise_conv_backward_op.register_fake
def _(dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), _empty(weight), _empty(bias)


@torch.library.custom_op("m3i_kernels::norm_gelu", mutates_args=())
def norm_gelu_op(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Compute gelu(layer_norm(z)) over the last dimension; arguments checked."""
    z = z.contiguous()
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    with torch.cuda.device_of(z):
        launch_norm(z, gamma.contiguous(), beta.contiguous(), eps, y)
    return y


@norm_gelu_op.register_fake
def _(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return _empty(z)


@torch.library.custom_op("m3i_kernels::norm_gelu_backward", mutates_args=())
def norm_gelu_backward_op(
    dy: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, gamma and beta; the same bits in every run."""
    dy, z = dy.contiguous(), z.contiguous()
    C = z.shape[-1]
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    partial = torch.empty((_programs(z), 2, C), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        launch_norm_backward(dy, z, gamma.contiguous(), beta.contiguous(), eps, dz, partial)
    return dz, partial[:, 0].sum(0).to(gamma.dtype), partial[:, 1].sum(0).to(beta.dtype)


@norm_gelu_backward_op.register_fake
def _(
    dy: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(z), _empty(gamma), _empty(beta)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return depthwise_conv_backward_op(dz, *ctx.saved_tensors)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *norm_gelu_backward_op(dy, *ctx.saved_tensors, ctx.eps), None


depthwise_conv_op.register_autograd(_conv_backward, setup_context=_save_conv)
norm_gelu_op.register_autograd(_norm_backward, setup_context=_save_norm)


def launch_conv(x: Tensor, taps: Tensor, bias: Tensor | None, z: Tensor) -> None:
    """Run the convolution into `z`; taps (K * K, C), channels of x neighbours in memory."""
    tiles = choose_conv_tiles(x.shape[-1], x.itemsize, _warp_size())
    strips, C = _strips(x, tiles), x.shape[-1]
    grid = (triton.cdiv(C, tiles.BLOCK_C) * triton.cdiv(strips, tiles.BLOCK_R),)
    depthwise_kernel[grid](
        x,
        taps,
        taps if bias is None else bias.contiguous(),
        z,
        *x.stride()[:3],
        x.shape[1],
        x.shape[2],
        strips,
        C=C,
        K=int(len(taps) ** 0.5),
        BIAS=bias is not None,
        **tiles._asdict(),
    )


def launch_weight(x: Tensor, dz: Tensor, partial: Tensor, K: int) -> None:
    """Run the gradient of the weights into `partial` (splits, K * K + 1, C); dz contiguous."""
    tiles = choose_conv_tiles(x.shape[-1], x.itemsize, _warp_size())
    splits, C = partial.shape[0], x.shape[-1]
    depthwise_weight_kernel[(splits * K * triton.cdiv(C, tiles.BLOCK_C),)](
        x,
        dz,
        partial,
        *x.stride()[:3],
        x.shape[1],
        x.shape[2],
        _strips(x, tiles),
        C=C,
        K=K,
        SPLITS=splits,
        **tiles._asdict(),
    )


def launch_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, y: Tensor) -> None:
    """Run LayerNorm and GELU into `y`; all contiguous."""
    C = z.shape[-1]
    rows, tiles = z.numel() // C, choose_norm_tiles(C, _warp_size())
    grid = (triton.cdiv(rows, tiles.BLOCK_R),)
    norm_gelu_kernel[grid](z, gamma, beta, y, rows, eps, C=C, **tiles._asdict())


def launch_norm_backward(
    dy: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, dz: Tensor, partial: Tensor
) -> None:
    """Run the gradient of LayerNorm and GELU into `dz` and `partial` (programs, 2, C)."""
    C = z.shape[-1]
    rows, tiles = z.numel() // C, choose_norm_tiles(C, _warp_size())
    programs = partial.shape[0]
    norm_gelu_backward_kernel[(programs,)](
        dy, z, gamma, beta, dz, partial, rows, eps, C=C, PROGRAMS=programs, **tiles._asdict()
    )


def _strips(x: Tensor, tiles: ConvTiles) -> int:
    return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], tiles.STRIP)


def _splits(x: Tensor, K: int) -> int:
    """Programs that share one row of taps of one block of channels: about 2,048 in all.

    A function of the shape alone, as the order of the sum depends on it.
    """
    tiles = choose_conv_tiles(x.shape[-1], x.itemsize, _warp_size())
    wanted = triton.cdiv(2048, K * triton.cdiv(x.shape[-1], tiles.BLOCK_C))
    return max(1, min(wanted, triton.cdiv(_strips(x, tiles), tiles.BLOCK_R)))


def _programs(z: Tensor) -> int:
    """Programs that share the rows: at least 16 rows each, which keeps partial sums small."""
    return min(1024, triton.cdiv(z.numel() // z.shape[-1], 16))


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K, K) to contiguous float32 (K * K, C): neighbouring threads read neighbours.

    In float32, since every strip would convert the weights again: an eighth of its instructions.
    """
    return weight.flatten(1).t().to(torch.float32).contiguous()


def _unit_channel_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _warp_size() -> int:
    return 64 if torch.version.hip else 32
