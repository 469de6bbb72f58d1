"""From a batch of uint8 views to the encoders' images: the input x of the method's equations.

    x   = m * x_i + (1 - m) * x_j      (arXiv 2211.09807, Section 3; m constant in p x p patches)
    x_i = view a of image n,  x_j = view a of its partner
    target views: view a ("same") or view b ("other"), clean

The partner of batch row n is n XOR 1: neighbours in the stream mix with each other, so that a mix
depends on stream positions only, and not on how ranks share a batch. Other pairings
(`config.Input`) are functions of the micro-batch. With `both_views` a second half of the batch
exchanges views a and b.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from m3i_kernels import PhotometricParams, block_mix, photometric
from torch import Tensor

from m3i_scale.config import Input
from m3i_scale.models.stochastic_depth import hash_keys


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
    position: Tensor


class MixedBatch(NamedTuple):
    """One micro-batch as the networks see it; row n is the mix whose image i is sample n."""

    image: Tensor  # (B, 3, H, W) input of the student; (2 B, ...): showing a, then b
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
    key: Tensor  # int64 (B,): of seed and stream position; what the networks draw follows from it

    def clean(self, view: str) -> Tensor:
        """The uncorrupted view "a" or "b" of every sample."""
        return self.clean_a if view == "a" else self.clean_b

    def crop(self, view: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Box (R, 4) and flip (R,) of view "a" or "b" of the samples in `rows`."""
        box, flip = (self.box_a, self.flip_a) if view == "a" else (self.box_b, self.flip_b)
        return box[rows], flip[rows]


@torch.no_grad()
def build_input(
    batch: Views,
    spec: Input,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
    seed: int = 0,
) -> MixedBatch:
    """Distort, normalise and mix one batch on the device it lies on; `seed` is the run's.

    Raises:
        ValueError: the batch has an odd number of rows, so that one would have no partner.
    """
    rows = len(batch.view_a)
    if rows % 2:
        raise ValueError(
            f"a micro-batch of {rows} leaves one image without a partner; use an even size"
        )
    normal: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype}
    view_a = photometric(batch.view_a, PhotometricParams(**batch.photometric_a))
    # What is not mixed is normalised in the pass that distorts it.
    clean_b = photometric(batch.view_b, PhotometricParams(**batch.photometric_b), **normal)
    partner = _partners(batch.position, spec.pairing).to(view_a.device)
    seen = batch.mask if spec.corruption != "none" else torch.ones_like(batch.mask)
    mixed = block_mix(view_a, None, partner, seen, patch_size=spec.patch, **normal)
    clean = (mixed.clean_a, clean_b)
    if spec.corruption == "mix" and spec.pairing != "self":
        image = mixed.mix
    else:
        image = _corrupted(*clean, partner, seen, spec)
    if spec.both_views:
        image = torch.cat([image, _corrupted(*clean[::-1], partner, seen, spec)])
    return MixedBatch(
        image, *clean, seen, partner,
        batch.box_a, batch.box_b, batch.flip_a, batch.flip_b,
        batch.tokens, batch.token_mask, batch.has_text, batch.category,
        hash_keys(batch.position, seed),
    )  # fmt: skip


def _partners(position: Tensor, pairing: str) -> Tensor:
    """Row of image j for every row of a micro-batch: int64 (B,)."""
    rows = torch.arange(len(position), device=position.device)
    if pairing == "self":
        return rows
    if pairing == "neighbours":
        return rows ^ 1
    # Neighbours in the order of a hash of the stream positions (Knuth's multiplicative one).
    order = torch.argsort(position * 2654435761 % 2**32, stable=True)
    partner = torch.empty_like(rows)
    partner[order] = order[rows ^ 1]
    return partner


def _corrupted(own: Tensor, other: Tensor, partner: Tensor, seen: Tensor, spec: Input) -> Tensor:
    """The input that shows the clean view `own` (B, 3, H, W) where `seen`; `other`: the other."""
    if spec.corruption == "none":
        return own
    visible = _pixels(seen, spec.patch)
    if spec.corruption == "mask":
        return own * visible.to(own.dtype)
    return torch.where(visible, own, other if spec.pairing == "self" else own[partner])


def _pixels(mask: Tensor, patch: int) -> Tensor:
    """Repeat a patch mask (B, h, w) over its pixels: (B, 1, h * patch, w * patch)."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
