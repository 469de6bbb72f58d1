"""Block mixing and normalisation in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def block_mix_reference(
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
    seen = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)  # (B, H, W)
    mixed = torch.where(seen.unsqueeze(-1), view_a, view_a[partner])  # (B, H, W, 3)

    def finish(images: Tensor) -> Tensor:
        return normalise_reference(images, mean, std, dtype, memory_format)

    return finish(mixed), finish(view_a), None if view_b is None else finish(view_b)


def normalise_reference(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Turn uint8 (B, H, W, 3) into `(x / 255 - mean) / std`, (B, 3, H, W) in `dtype`."""
    compute = torch.promote_types(dtype, torch.float32)
    like: dict[str, Any] = {"dtype": compute, "device": images.device}
    scale = 1 / (255 * torch.tensor(std, **like))
    shift = -torch.tensor(mean, **like) / torch.tensor(std, **like)
    scaled = (images.to(compute) * scale + shift).to(dtype)
    return scaled.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
