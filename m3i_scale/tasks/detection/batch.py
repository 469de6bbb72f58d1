"""One image with its objects, and several of them as one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

DIVISOR = 32  # the stride of the coarsest map of a backbone


@dataclass(frozen=True)
class Objects:
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

    def map(self, function: Callable[[Tensor], Tensor]) -> Objects:
        """The same with `function` applied to every tensor."""
        masks = None if self.masks is None else function(self.masks)
        return Objects(function(self.boxes), function(self.labels), masks)


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
class Batch:
    """B images as one micro-batch.

    images  uint8 (B, 3, H, W), each in the upper left corner, height and width multiples of 32
    sizes   int64 (B, 2), height and width of each image in there
    keys    int64 (B,): what stochastic depth draws from; None: the default generator
    """

    images: Tensor
    sizes: Tensor
    objects: tuple[Objects, ...]
    image_ids: tuple[int, ...]
    originals: tuple[tuple[int, int], ...]
    key: tuple[str, ...]
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same with `function` applied to every tensor."""
        return replace(
            self,
            images=function(self.images),
            sizes=function(self.sizes),
            objects=tuple(objects.map(function) for objects in self.objects),
            keys=None if self.keys is None else function(self.keys),
        )

    def pin_memory(self) -> Batch:
        """Copy into page-locked memory, from which a copy to the device is asynchronous."""
        return self.map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Move every tensor to `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


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
    images = batch.images.to(torch.float32) / 255
    shape = (1, 3, 1, 1)
    images = (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)
    return (images * valid(batch.sizes, *images.shape[-2:])[:, None]).to(dtype)


def valid(sizes: Tensor, height: int, width: int) -> Tensor:
    """Bool (B, height, width): True inside the images of these sizes (B, 2)."""
    rows = torch.arange(height, device=sizes.device)[None, :, None] < sizes[:, 0, None, None]
    return rows & (torch.arange(width, device=sizes.device)[None, None] < sizes[:, 1, None, None])
