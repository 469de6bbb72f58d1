"""Launch of the block-mixing kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from m3i_kernels.block_mix.kernel import block_mix_kernel

_THREADS = 128


class Tiles(NamedTuple):
    """How one launch is cut up: names as in the kernel."""

    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    num_warps: int


def choose_tiles(patch_size: int, channels_last: bool, itemsize: int, warp_size: int = 32) -> Tiles:
    """Choose the launch parameters: 16 bytes of results per thread and tile."""
    columns = triton.next_power_of_2(patch_size * (3 if channels_last else 1))
    rows = max(1, _THREADS * 16 // itemsize // columns)
    rows = min(rows, triton.next_power_of_2(patch_size))
    return Tiles(rows, columns, max(1, min(4, rows * columns // 128)) * 32 // warp_size or 1)


def block_mix_triton(
    view_a: Tensor,
    view_b: Tensor | None,
    partner: Tensor,
    mask: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mix and normalise; arguments as in `block_mix`, already checked."""
    B, H, W, _ = view_a.shape
    view_a, partner, mask = view_a.contiguous(), partner.contiguous(), mask.contiguous()
    view_b = None if view_b is None else view_b.contiguous()

    def output() -> Tensor:
        shape, device = (B, 3, H, W), view_a.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)

    mix, clean_a = output(), output()
    clean_b = None if view_b is None else output()
    channels_last = memory_format == torch.channels_last
    tiles = choose_tiles(patch_size, channels_last, mix.itemsize, 64 if torch.version.hip else 32)
    patches = (H // patch_size) * (W // patch_size)
    block_mix_kernel[(B * patches * triton.cdiv(patch_size, tiles.BLOCK_ROWS),)](
        view_a,
        view_a if view_b is None else view_b,
        partner,
        mask,
        mix,
        clean_a,
        mix if clean_b is None else clean_b,
        *(1 / (255 * s) for s in std),
        *(-m / s for m, s in zip(mean, std, strict=True)),
        H=H,
        W=W,
        PATCH=patch_size,
        HAS_B=view_b is not None,
        CHANNELS_LAST=channels_last,
        enable_fp_fusion=True,
        **tiles._asdict(),
    )
    return mix, clean_a, clean_b
