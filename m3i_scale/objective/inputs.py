"""From a batch of uint8 views to what the encoders see: the input of the method's equations.

    x   = m * x_i + (1 - m) * x_j      (section 2; m constant inside p x p patches)
    x_i = view a of image n,  x_j = view a of its partner
    target views: view a ("same") or view b ("other"), clean

The partner of batch row n is n XOR 1: neighbours in the stream mix with each other, so that a mix
depends on stream positions alone and not on how a batch is spread over ranks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from m3i_kernels import PhotometricParams, block_mix, photometric
from torch import Tensor

from m3i_scale.config import Input


class Views(Protocol):
    """The fields of a data batch that this module reads (shapes as in `m3i_scale.data.batch`)."""

    view_a: Tensor
    view_b: Tensor
    box_a: Tensor
    box_b: Tensor
    flip_a: Tensor
    flip_b: Tensor
    photometric_a: dict[str, Tensor]
    photometric_b: dict[str, Tensor]
    tokens: Tensor
    token_mask: Tensor
    has_text: Tensor
    category: Tensor
    mask: Tensor


class Scene(NamedTuple):
    """One micro-batch as the networks see it; row n is the mix whose image i is sample n."""

    image: Tensor  # (B, 3, H, W) input of the online encoder
    clean_a: Tensor  # (B, 3, H, W) the input view without corruption
    clean_b: Tensor  # (B, 3, H, W) the other view
    seen: Tensor  # bool (B, H/p, W/p): patches that show image i
    partner: Tensor  # int64 (B,): row of image j
    box_a: Tensor  # float32 (B, 4): crop of view a in source pixels: top, left, height, width
    box_b: Tensor
    flip_a: Tensor  # bool (B,)
    flip_b: Tensor
    tokens: Tensor  # int64 (B, L)
    token_mask: Tensor  # bool (B, L)
    has_text: Tensor  # bool (B,)
    category: Tensor  # int64 (B,), -1 without

    def clean(self, view: str) -> Tensor:
        """The uncorrupted view of a target: "same" as the input, or the "other" one."""
        return self.clean_a if view == "same" else self.clean_b


@torch.no_grad()
def scene(
    batch: Views,
    spec: Input,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Scene:
    """Distort, normalise and mix one batch on the device it lies on.

    Raises:
        ValueError: the batch has an odd number of rows, so that one would have no partner.
    """
    rows = len(batch.view_a)
    if rows % 2:
        raise ValueError(
            f"a micro-batch of {rows} leaves one image without a partner; use an even size"
        )
    view_a = photometric(batch.view_a, PhotometricParams(**batch.photometric_a))
    view_b = photometric(batch.view_b, PhotometricParams(**batch.photometric_b))
    partner = torch.arange(rows, device=view_a.device) ^ 1
    seen = batch.mask if spec.corruption != "none" else torch.ones_like(batch.mask)
    mixed = block_mix(
        view_a, view_b, partner, seen, patch_size=spec.patch, mean=mean, std=std, dtype=dtype
    )
    assert mixed.clean_b is not None  # view_b was given
    image = {
        "none": lambda: mixed.clean_a,
        "mask": lambda: mixed.clean_a * _pixels(seen, spec.patch).to(dtype),
        "mix": lambda: mixed.mix,
    }[spec.corruption]()
    return Scene(
        image, mixed.clean_a, mixed.clean_b, seen, partner,
        batch.box_a, batch.box_b, batch.flip_a, batch.flip_b,
        batch.tokens, batch.token_mask, batch.has_text, batch.category,
    )  # fmt: skip


def _pixels(mask: Tensor, patch: int) -> Tensor:
    """Repeat a patch mask (B, h, w) over its pixels: (B, 1, h * patch, w * patch)."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
