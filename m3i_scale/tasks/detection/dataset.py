"""COCO and LVIS as map-style data sets: an index gives an image and its objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_scale.config.detection import CocoSet, DetectionData
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.decode import decode_file
from m3i_scale.tasks.detection import resizing
from m3i_scale.tasks.detection.annotation_faults import ImageEntry
from m3i_scale.tasks.detection.batch import Batch, Objects, Sample, collate
from m3i_scale.tasks.detection.coco import (
    Annotation,
    CocoFile,
    absent_files,
    read_coco,
    require_same_categories,
    short,
)


class CocoImages:
    """What the data sets of training and evaluation share; see there."""

    def __init__(self, file: CocoFile, folder: Path, data: DetectionData, *, masks: bool) -> None:
        self.file, self.folder, self.data, self.masks = file, folder, data, masks

    def __len__(self) -> int:
        return len(self.file)

    @property
    def categories(self) -> list[str]:
        """Names of the categories, by the numbers of `Objects.labels`."""
        return [category.name for category in self.file.categories]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Put samples into one batch."""
        return collate(samples)

    def read(self, index: int, *, masks: bool = False) -> tuple[Tensor, Objects]:
        """The stored image, uint8 (3, H, W), and its objects without crowds.

        Raises:
            BadSample: the file is not there, damaged, or not of the listed size.
        """
        entry = self.file.images[index]
        path = self.folder / entry.file
        image = decode_file(path, max_pixels=self.data.max_pixels).permute(2, 0, 1)
        if image.shape[-2:] != (entry.height, entry.width):
            listed = f"listed are {entry.width}x{entry.height}"
            found = f"{image.shape[-1]}x{image.shape[-2]}, {listed}"
            raise BadSample("image of another size", f"{path}: {found}")
        return image, self._objects(index, entry, masks)

    def identity(self) -> dict[str, Any]:
        """A hash of all images and annotations."""
        return {"samples": len(self), "content": self.file.fingerprint()}

    def describe(self) -> dict[str, int | float | str]:
        """For `--dry-run`."""
        kind = "lvis" if self.file.lvis else "coco"
        return {"kind": kind, "samples": len(self)}

    def _objects(self, index: int, entry: ImageEntry, with_masks: bool) -> Objects:
        chosen = [a for a in self.file.annotations(index) if not a.crowd]
        boxes = torch.tensor([a.box for a in chosen], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([a.category for a in chosen], dtype=torch.int64)
        if not with_masks:
            return Objects(boxes, labels)
        masks = torch.zeros(len(chosen), entry.height, entry.width, dtype=torch.bool)
        for mask, annotation in zip(masks, chosen, strict=True):
            mask.copy_(torch.from_numpy(decoded_mask(annotation, entry)))
        return Objects(boxes, labels, masks)

    def _sample(self, index: int, found: resizing.Scene) -> Sample:
        entry = self.file.images[index]
        image, objects = resizing.unwrapped(found)
        return Sample(image, objects, entry.id, (entry.height, entry.width), entry.file)


class TrainingImages(CocoImages):
    """Images with augmentation. All that is drawn comes from torch's default generator."""

    def load(self, index: int) -> Sample:
        """One image, flipped and resized by chance; raises BadSample as `read`."""
        found = resizing.for_training(
            resizing.scene(*self.read(index, masks=self.masks)),
            self.data.resize,
            flip_probability=self.data.flip_probability,
            least_box=self.data.least_box,
        )
        return self._sample(index, found)


class TestImages(CocoImages):
    """Images as they are evaluated, in the order of their file; objects without masks.

    `masks`: whether masks are evaluated, too.
    """

    __test__ = False  # no test of pytest's

    def load(self, index: int) -> Sample:
        """One image at the size of evaluation; raises BadSample as `read`."""
        found = resizing.scene(*self.read(index))
        found = resizing.to_sides(found, self.data.test_side, self.data.test_longest)
        return self._sample(index, found)


def open_training(data: DetectionData, *, masks: bool) -> tuple[TrainingImages, list[str]]:
    """The training set, and what was left out of it or changed, a line for each cause.

    Raises:
        ValueError: the annotation file cannot be used (`read_coco`); more images are absent than
            `data.max_bad_rate` allows; none has an object.
    """
    file = read_coco(data.train.annotations, masks=masks)
    file, absent = _present(file, data.train, allowed=data.max_bad_rate)
    lines = [*file.findings.lines(), *absent]
    kept = [i for i in range(len(file)) if any(not a.crowd for a in file.annotations(i))]
    if not kept:
        raise ValueError(f"{file.path}: no image has an object to learn from")
    if not data.without_objects and len(kept) < len(file):
        lines.append(f"left out {len(file) - len(kept):,} images without objects")
        file = file.select(kept)
    return TrainingImages(file, Path(data.train.images), data, masks=masks), lines


def open_test(
    data: DetectionData, *, masks: bool, train: CocoFile | None = None
) -> tuple[TestImages, list[str]]:
    """The validation set, and what was left out of it or changed, a line for each cause.

    Raises:
        ValueError: its annotation file cannot be used; it has other categories than `train`; an
            image is absent.
    """
    file = read_coco(data.val.annotations, masks=masks)
    if train is not None:
        require_same_categories(train, file)
    _present(file, data.val, allowed=0.0)
    return TestImages(file, Path(data.val.images), data, masks=masks), file.findings.lines()


def _present(file: CocoFile, where: CocoSet, *, allowed: float) -> tuple[CocoFile, list[str]]:
    """The file without the images that are not there, and a line about them."""
    absent = absent_files(file.images, where.images)
    if not absent:
        return file, []
    names = ", ".join(short(file.images[i].file) for i in absent[:3])
    what = f"{len(absent):,} of {len(file):,} images are listed and not there: {names}"
    if len(absent) > allowed * len(file):
        raise ValueError(
            f"{file.path}: {what}; fetch them, or see that {where.images} is the right folder"
        )
    gone = set(absent)
    return file.select([i for i in range(len(file)) if i not in gone]), [
        f"{what}; they are left out"
    ]


def decoded_mask(annotation: Annotation, image: ImageEntry) -> np.ndarray[Any, Any]:
    """The mask of an object, bool (H, W), of polygons or run lengths."""
    from faster_coco_eval.core import mask as coco_mask

    runs = coco_mask.segmToRle(annotation.segmentation, image.width, image.height)
    return np.asarray(coco_mask.decode(runs)).astype(bool)
