"""Sizes of training and test images: large-scale jitter, drawn sides, fixed sides, flips.

Everything is drawn from torch's default generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F

from m3i_scale.config.detection import Jitter, Sides
from m3i_scale.tasks.detection.batch import Objects

_CUT = 0.5  # pixels by which a box must reach beyond the crop to count as cut


class Scene(NamedTuple):
    """An image and its objects while they are resized: tv_tensors and labels, float boxes."""

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    masks: tv_tensors.Mask | None


def scene(image: Tensor, objects: Objects) -> Scene:
    """Wrap an image uint8 (3, H, W) and its objects for torchvision's transforms."""
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=size)
    masks = None if objects.masks is None else tv_tensors.Mask(objects.masks.to(torch.uint8))
    return Scene(tv_tensors.Image(image), boxes, objects.labels, masks)


def unwrapped(found: Scene) -> tuple[Tensor, Objects]:
    """The plain tensors of a scene."""
    masks = None if found.masks is None else found.masks.as_subclass(Tensor).bool()
    boxes = found.boxes.as_subclass(Tensor).float()
    return found.image.as_subclass(Tensor), Objects(boxes, found.labels, masks)


def for_training(
    found: Scene, resize: Jitter | Sides, *, flip_probability: float, least_box: float
) -> Scene:
    """Flip by chance, resize, and leave out the objects of which too little remains."""
    if float(torch.rand(())) < flip_probability:
        found = _flipped(found)
    if isinstance(resize, Jitter):
        found = _jittered(found, resize)
    else:
        shorter = resize.shorter[int(torch.randint(len(resize.shorter), ()))]
        found = to_sides(found, shorter, resize.longest)
    return _large_enough(found, least_box)


def to_sides(found: Scene, shorter: int, longest: int) -> Scene:
    """Resize the whole image to a shorter side, or so far that the longer one has `longest`."""
    height, width = found.image.shape[-2:]
    scale = min(shorter / min(height, width), longest / max(height, width))
    return _resized(found, max(1, round(height * scale)), max(1, round(width * scale)))


def _jittered(found: Scene, jitter: Jitter) -> Scene:
    height, width = found.image.shape[-2:]
    low, high = jitter.scale
    drawn = low + (high - low) * float(torch.rand(()))
    scale = drawn * jitter.size / max(height, width)
    # What is smaller than the square is padded with its batch: masks stay as small as images.
    found = _resized(found, max(1, round(height * scale)), max(1, round(width * scale)))
    return _cropped(found, jitter.size)


def _cropped(found: Scene, size: int) -> Scene:
    """A random part of at most size x size pixels; boxes of cut objects fit what is left."""
    height, width = found.image.shape[-2:]
    high, wide = min(size, height), min(size, width)
    if (high, wide) == (height, width):
        return found
    top = int(torch.randint(height - high + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))
    whole = found.boxes.as_subclass(Tensor) - torch.tensor([left, top, left, top])
    crop = _each(found, lambda value: F.crop(value, top, left, high, wide))
    if crop.masks is None or not len(crop.labels):
        return crop
    inside = whole.clamp(min=0).minimum(torch.tensor([wide, high, wide, high]))
    cut = ((whole - inside).abs() > _CUT).any(1) & _visible(crop.masks)
    boxes = crop.boxes.as_subclass(Tensor).clone()
    if cut.any():
        tight = masks_to_boxes(crop.masks.as_subclass(Tensor)[cut])
        boxes[cut] = tight.to(boxes) + torch.tensor([0, 0, 1, 1])
    return crop._replace(boxes=tv_tensors.wrap(boxes, like=crop.boxes))


def _large_enough(found: Scene, least: float) -> Scene:
    boxes = found.boxes.as_subclass(Tensor)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= least).all(1)
    if found.masks is not None:
        kept &= _visible(found.masks)
    masks = None if found.masks is None else tv_tensors.wrap(found.masks[kept], like=found.masks)
    boxes = tv_tensors.wrap(boxes[kept], like=found.boxes)
    return Scene(found.image, boxes, found.labels[kept], masks)


def _visible(masks: tv_tensors.Mask) -> Tensor:
    """Bool (N,): which masks have a pixel."""
    return masks.as_subclass(Tensor).flatten(1).amax(1) > 0


def _flipped(found: Scene) -> Scene:
    return _each(found, F.horizontal_flip)


def _resized(found: Scene, height: int, width: int) -> Scene:
    return _each(found, lambda value: F.resize(value, [height, width], antialias=True))


def _each(found: Scene, change: object) -> Scene:
    """Apply one of torchvision's functions to image, boxes and masks."""
    assert callable(change)
    masks = found.masks
    if masks is not None:
        # torchvision resizes no empty stack
        size = change(found.image[:1]).shape[-2:] if not len(masks) else None
        masks = change(masks) if size is None else tv_tensors.Mask(masks.new_zeros(0, *size))
    return Scene(change(found.image), change(found.boxes), found.labels, masks)
