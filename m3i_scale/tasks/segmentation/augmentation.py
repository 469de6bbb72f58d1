"""What training does to an image and its mask; torch's global generator draws, and no other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from m3i_scale.config.segmentation import IGNORED, SegmentationData
from m3i_scale.tasks.segmentation.dataset import Sample

Box = tuple[int, int, int, int]  # top, left, height, width

_CROPS = 10  # tried until no class has too large a share
# Bounds of what distorts colours, after SSD (arXiv 1512.02325); hue as a share of the circle, with
# the number that the reference results on ADE20k were trained with.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 180


class TrainingCrop:
    """Resize, crop, flip, colours: a sample of any size becomes one of `data.crop` pixels."""

    def __init__(self, data: SegmentationData) -> None:
        self.crop, self.config = data.crop, data.augmentation
        # Zero once the mean is subtracted.
        self.fill = [round(255 * value) for value in data.mean]

    def __call__(self, sample: Sample) -> Sample:
        """Augment one sample."""
        config = self.config
        factor = uniform(*config.scale)
        sides = config.short_side * factor, config.long_side * factor
        size = list(fitted(sample.mask.shape, *sides))
        image = tv_tensors.Image(
            F.resize(sample.image, size, InterpolationMode.BILINEAR, antialias=True)
        )
        # torchvision's own would take the value half a pixel beside the image's.
        mask = tv_tensors.Mask(interpolate(sample.mask[None, None], size, mode="nearest-exact")[0])
        box = choose_crop(mask.as_subclass(Tensor)[0], self.crop, config.one_class_at_most)
        image, mask = F.crop(image, *box), F.crop(mask, *box)
        if uniform() < config.flip:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if config.photometric:
            image = distort(image, config.photometric)
        border = [0, 0, self.crop - box[3], self.crop - box[2]]
        if any(border):
            image, mask = F.pad(image, border, fill=self.fill), F.pad(mask, border, fill=IGNORED)
        image, mask = image.as_subclass(Tensor), mask.as_subclass(Tensor)[0]
        return Sample(image.contiguous(), mask.contiguous(), sample.key)


def uniform(low: float = 0.0, high: float = 1.0) -> float:
    """A number between both, of torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


def fitted(
    size: Sequence[int], short_side: float, long_side: float, multiple: int = 1
) -> tuple[int, int]:
    """Rows and columns of an image resized to fit into both lengths, in its own proportions.

    Each is rounded, and then up to a multiple of `multiple`.
    """
    factor = min(short_side / min(size), long_side / max(size))
    rows, columns = (max(int(side * factor + 0.5), 1) for side in size)
    return -(-rows // multiple) * multiple, -(-columns // multiple) * multiple


def choose_crop(mask: Tensor, side: int, one_class_at_most: float) -> Box:
    """Draw a crop, again while one class has too large a share of what is labelled in it."""
    height, width = min(side, mask.shape[0]), min(side, mask.shape[1])
    for _ in range(_CROPS):
        top = int(torch.randint(mask.shape[0] - height + 1, ()))
        left = int(torch.randint(mask.shape[1] - width + 1, ()))
        if one_class_at_most >= 1:
            break
        part = mask[top : top + height, left : left + width]
        counts = torch.bincount(part.flatten().int(), minlength=IGNORED + 1)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < one_class_at_most * counts.sum():
            break
    return top, left, height, width


def distort(image: Tensor, probability: float) -> Tensor:
    """Change brightness, then contrast, saturation and hue; contrast may come last instead."""

    def drawn() -> bool:
        return uniform() < probability

    if drawn():
        image = F.adjust_brightness(image, uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS))
    contrast_first = bool(torch.randint(2, ()))
    if contrast_first and drawn():
        image = F.adjust_contrast(image, uniform(*_CONTRAST))
    if drawn():
        image = F.adjust_saturation(image, uniform(*_SATURATION))
    if drawn():
        image = F.adjust_hue(image, uniform(-_HUE, _HUE))
    if not contrast_first and drawn():
        image = F.adjust_contrast(image, uniform(*_CONTRAST))
    return image
