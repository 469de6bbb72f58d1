"""Launches of the photometric kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from m3i_kernels.photometric.kernel import (
    blur_columns_kernel,
    blur_rows_kernel,
    grey_sum_kernel,
    jitter_kernel,
)
from m3i_kernels.photometric.params import PhotometricParams


class Tiles(NamedTuple):
    """How the launches are cut up: names as in the kernels."""

    BLOCK: int
    num_warps: int


def choose_tiles(warp_size: int = 32) -> Tiles:
    """Choose the launch parameters: 4 pixels per thread."""
    return Tiles(512, 128 // warp_size)


def photometric_triton(
    images: Tensor,
    params: PhotometricParams,
    blur_kernel_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Augment; arguments as in `photometric`, already checked."""
    images = images.contiguous()
    params = PhotometricParams(*(p.contiguous() for p in params))
    B, H, W, _ = images.shape
    pixels = H * W
    if mean is None or std is None:
        out = torch.empty_like(images)
        statistics: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    else:
        shape, device = (B, 3, H, W), images.device
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
        shift = (-m / s for m, s in zip(mean, std, strict=True))
        statistics = (*(1 / (255 * s) for s in std), *shift)
    channels_last = mean is None or memory_format == torch.channels_last
    finish = {"NORMALISE": mean is not None, "CHANNELS_LAST": channels_last}
    tiles = choose_tiles(64 if torch.version.hip else 32)
    launch = {**tiles._asdict(), "enable_fp_fusion": False}
    tiles_per_image = triton.cdiv(pixels, tiles.BLOCK)
    grid = (B * tiles_per_image,)
    sums = torch.empty((B, tiles_per_image), dtype=torch.int32, device=images.device)
    grey_sum_kernel[grid](images, sums, *params[:5], pixels, **launch)
    levels = torch.empty_like(images)
    jitter_kernel[grid](
        images,
        sums,
        *params,
        levels,
        out,
        pixels,
        *statistics,
        BLOCK_TILES=triton.next_power_of_2(tiles_per_image),
        **finish,
        **launch,
    )
    rows = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    sigma, solarize = params.blur_sigma, params.solarize
    taps = {"TAPS": blur_kernel_size}
    blur_rows_kernel[grid](levels, sigma, rows, pixels, W, **taps, **launch)
    blur_columns_kernel[grid](
        rows, sigma, solarize, out, pixels, W, *statistics, **taps, **finish, **launch
    )
    return out
