"""One image with its objects, and several of them as one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_scale.data.batch import TensorFields
from m3i_scale.tasks.pixels import normalised_pixels

DIVISOR = 32  # the stride of the coarsest map of a backbone


@dataclass(frozen=True)
class Objects(TensorFields):
    """N objects of an image, in its pixels as it is fed to the networks.

    boxes   float32 (N, 4): left, top, right, bottom
    labels  int64 (N,), categories from 0
    masks   bool (N, H, W) of the image, or None where nobody needs them
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Sample:
    """One image: uint8 (3, H, W), its objects, and where it comes from.

    image_id      as the annotation file has it
    original      height and width of the stored image
    key           its file, for logs
    """

    image: Tensor
    objects: Objects
    image_id: int
    original: tuple[int, int]
    key: str


@dataclass(frozen=True)
class Batch(TensorFields):
    """B images as one micro-batch.

    images  uint8 (B, 3, H, W), each in the upper left corner, height and width multiples of 32
    sizes   int64 (B, 2), height and width of each image in there
    keys    int64 (B,): what stochastic depth draws from; None: the default generator
    seed    of everything else that is drawn in training, known without waiting for the device
    """

    images: Tensor
    sizes: Tensor
    objects: tuple[Objects, ...]
    image_ids: tuple[int, ...]
    originals: tuple[tuple[int, int], ...]
    key: tuple[str, ...]
    keys: Tensor | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.images)


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples of any sizes into one batch, padded at the right and at the bottom."""
    sizes = torch.tensor([sample.image.shape[-2:] for sample in samples])
    height, width = (-(-int(side) // DIVISOR) * DIVISOR for side in sizes.amax(0))
    images = torch.stack([_padded(sample.image, height, width) for sample in samples])
    return Batch(
        images,
        sizes,
        tuple(sample.objects for sample in samples),
        tuple(sample.image_id for sample in samples),
        tuple(sample.original for sample in samples),
        tuple(sample.key for sample in samples),
    )


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def normalised(
    batch: Batch, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The images (B, 3, H, W) with mean 0 and deviation 1, and zeros where they are padded."""
    images = normalised_pixels(batch.images, mean, std)
    return (images * valid(batch.sizes, *images.shape[-2:])[:, None]).to(dtype)


def valid(sizes: Tensor, height: int, width: int) -> Tensor:
    """Bool (B, height, width): True inside the images of these sizes (B, 2)."""
    rows = torch.arange(height, device=sizes.device)[None, :, None] < sizes[:, 0, None, None]
    return rows & (torch.arange(width, device=sizes.device)[None, None] < sizes[:, 1, None, None])
