"""Block-mask mixing of image pairs, fused with normalisation: public function and checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3i_kernels import _backend, _checks
from m3i_kernels.block_mix.reference import block_mix_reference

__all__ = ["BlockMixed", "block_mix"]


class BlockMixed(NamedTuple):
    """What `block_mix` returns: normalised images, each (B, 3, H, W)."""

    mix: Tensor
    clean_a: Tensor
    clean_b: Tensor | None


def block_mix(
    view_a: Tensor,
    view_b: Tensor | None,
    partner: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    memory_format: str = "channels_last",
    backend: str = "auto",
) -> BlockMixed:
    """Mix pairs of images patch by patch and normalise mixes and clean views, in one pass.

        mix[n] = mask[n] * a[n] + (1 - mask[n]) * a[partner[n]],    a = (view_a / 255 - mean) / std

    The mask is constant inside patches of `patch_size` pixels (M3I pre-training,
    arXiv 2211.09807, Section 3). No gradient flows.

    Args:
        view_a: uint8 (B, H, W, 3), the views that are mixed.
        view_b: uint8 (B, H, W, 3), the other views, only normalised; may be None.
        partner: int64 (B,), the index of image j of each mix.
        mask: bool (B, H / patch_size, W / patch_size), True where image n itself is seen.
        patch_size: side of a mask patch in pixels; divides H and W.
        mean: per-channel mean of images in [0, 1].
        std: per-channel standard deviation of images in [0, 1].
        dtype: float32, bfloat16 or float16 (the reference also gives float64).
        memory_format: `channels_last` or `contiguous`, of the (B, 3, H, W) results.
        backend: `auto`, `triton` or `reference`; `auto` follows `set_backend`.

    Raises:
        ValueError: for a wrong shape, dtype, device or parameter. An index in `partner` outside
            the batch raises on the CPU and is a device-side assertion on a GPU.
    """
    chosen = _backend.resolve(backend, view_a.device)
    layout = _checks.memory_format(memory_format)
    _check(view_a, view_b, partner, mask, patch_size, mean, std)
    floats = (*_checks.FLOATS, torch.float64) if chosen == "reference" else _checks.FLOATS
    if dtype not in floats:
        raise ValueError(f"dtype is {dtype}, but must be one of {', '.join(map(str, floats))}")
    arguments = (view_a, view_b, partner, mask, patch_size, mean, std, dtype, layout)
    if chosen == "reference":
        return BlockMixed(*block_mix_reference(*arguments))
    from m3i_kernels.block_mix.op import block_mix_triton  # Triton is only needed from here on

    with torch.cuda.device_of(view_a):
        return BlockMixed(*block_mix_triton(*arguments))


def _check(
    view_a: Tensor,
    view_b: Tensor | None,
    partner: Tensor,
    mask: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    B, H, W = _checks.images_uint8("view_a", view_a)
    device = view_a.device
    if view_b is not None:
        shape = (B, H, W, 3)
        _checks.tensor_like("view_b", view_b, shape, (torch.uint8,), device, "the shape of view_a")
    _checks.tensor_like("partner", partner, (B,), (torch.int64,), device, "(B,)")
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"patch_size is {patch_size}, but must divide the image, {H} x {W} pixels")
    grid = (B, H // patch_size, W // patch_size)
    _checks.tensor_like(
        "mask", mask, grid, (torch.bool,), device, "(B, H / patch_size, W / patch_size)"
    )
    _checks.normalisation(mean, std)
    _checks.values("partner", partner, (partner >= 0) & (partner < B), f"an index in [0, {B})")
