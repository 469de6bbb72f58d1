"""What is wrong with one annotation of COCO's or LVIS's files; every fault has a name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]  # left, top, right, bottom
EMPTY = "empty box"
OUTSIDE = "box outside its image"
CUT = "box that reaches beyond its image"


class ImageEntry(NamedTuple):
    """One listed image."""

    id: int
    file: str
    height: int
    width: int


def fault(
    entry: object, images: Mapping[int, ImageEntry], categories: set[int], masks: bool
) -> str | None:
    """Why an annotation cannot be used as it stands; None: it can."""
    if not isinstance(entry, dict) or not whole(entry.get("image_id")):
        return "annotation without image_id"
    image = images.get(entry["image_id"])
    if image is None:
        return "annotation of an image that is not listed"
    if not whole(entry.get("category_id")) or entry["category_id"] not in categories:
        return "unknown category"
    if not numbers(entry.get("bbox"), 4):
        return "box that is not four numbers"
    shape = entry.get("segmentation")
    cause = _mask_fault(shape, image) if shape else ("no mask" if masks else None)
    return cause or _box_fault(entry["bbox"], image)


def clipped(bbox: Sequence[float], image: ImageEntry) -> Box | None:
    """COCO's (left, top, width, height) as corners inside the image; None where nothing is left."""
    left, top, width, height = (float(value) for value in bbox)
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + width, float(image.width)),
        min(top + height, float(image.height)),
    )
    return box if box[2] > box[0] and box[3] > box[1] else None


def compressed_lengths(counts: str) -> Iterator[int]:
    """The run lengths of COCO's compressed counts; raises ValueError for other texts.

    Six bits a character from "0" on, the highest of which says that more follow; from the fourth
    number on they are differences to the number before the last.
    """
    before = [0, 0]
    value = shift = position = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        length = value + (before[0] if position > 2 else 0)
        yield length
        before = [before[1], length]
        value, shift, position = 0, 0, position + 1
    if shift:
        raise ValueError("the run lengths end in the middle of a number")


def whole(value: object) -> bool:
    """Whether this is a whole number that evaluators can store: 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def numbers(values: object, count: int | None = None) -> bool:
    """Whether these are finite numbers, as many as wanted."""
    return (
        isinstance(values, list)
        and (count is None or len(values) == count)
        and all(
            isinstance(v, int | float)
            and not isinstance(v, bool)
            and -sys.float_info.max <= v <= sys.float_info.max  # False for NaN; any int compares
            for v in values
        )
    )


def _box_fault(bbox: Sequence[float], image: ImageEntry) -> str | None:
    left, top, width, height = bbox
    if width <= 0 or height <= 0:
        return EMPTY
    if clipped(bbox, image) is None:
        return OUTSIDE
    beyond = max(-left, -top, left + width - image.width, top + height - image.height)
    return CUT if beyond > 1 else None


def _mask_fault(shape: object, image: ImageEntry) -> str | None:
    if isinstance(shape, list):
        if not all(numbers(p) and len(p) >= 6 and len(p) % 2 == 0 for p in shape):
            return "damaged polygon"
        near = all(_near(p[::2], image.width) and _near(p[1::2], image.height) for p in shape)
        return None if near else "polygon far outside its image"
    if not isinstance(shape, dict) or not numbers(shape.get("size"), 2):
        return "damaged mask"
    if shape["size"] != [image.height, image.width]:
        return "mask of another size than its image"
    counts = shape.get("counts")
    try:
        lengths: Any = list(compressed_lengths(counts)) if isinstance(counts, str) else counts
    except ValueError:
        return "damaged mask"
    if not isinstance(lengths, list) or not all(whole(n) and n >= 0 for n in lengths):
        return "damaged mask"
    return None if sum(lengths) == image.height * image.width else "damaged mask"


def _near(coordinates: Sequence[float], side: int) -> bool:
    """Whether none is further away than the image is long.

    Polygons are drawn point by point along their edges, beyond the image as well: one damaged
    coordinate would take all memory.
    """
    return -side <= min(coordinates) and max(coordinates) <= 2 * side
