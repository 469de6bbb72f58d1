"""Images and their masks from two folders: what they hold, and one sample of it.

Both folders are listed once, when the set is opened: images without a mask are left out and named,
and what is wrong with the set as a whole is refused. Pixels are read one sample at a time; a sample
that cannot be used raises `BadSample`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import IGNORED, MaskedImages, SegmentationData
from m3i_scale.data.bad_sample import BadSample, explain, words_of
from m3i_scale.data.batch import TensorFields
from m3i_scale.data.decode import decode_image

log = logging.getLogger(__name__)

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_MASK = ".png"
_PROBED = 8  # samples that are read when a set is opened
_LABELS = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of one channel of whole numbers


@dataclass(frozen=True)
class Sample:
    """One image and its mask.

    image   uint8 (3, H, W)
    mask    uint8 (H, W): classes from 0 on, `IGNORED` where there is none
    key     the image's file, below the folder of images
    """

    image: Tensor
    mask: Tensor
    key: str


@dataclass(frozen=True)
class Batch(TensorFields):
    """B samples of one size S, on the CPU or a device.

    images  uint8 (B, 3, S, S)
    masks   uint8 (B, S, S)
    key     the images' files
    """

    images: Tensor
    masks: Tensor
    key: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.key)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.stack([sample.mask for sample in samples]),
        tuple(sample.key for sample in samples),
    )


class SegmentationSet:
    """A map-style set of images with masks, in the order of their names.

    Args:
        files: where they lie.
        data: how masks are to be read.
        classes: their number.
        augment: what becomes of a sample; torch's global generator draws. None: nothing.
        key: of the configuration, for messages.

    Raises:
        ConfigError: a folder or a list does not exist or is empty, no image has a mask, a listed
            image is not there, or none of the first samples read can be used.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        files: MaskedImages,
        data: SegmentationData,
        classes: int,
        augment: Callable[[Sample], Sample] | None = None,
        key: str = "data.train",
    ) -> None:
        self.files, self.classes, self.augment = files, classes, augment
        self._data = data
        images = _stems(Path(files.images), _IMAGES, "images", key)
        masks = _stems(Path(files.masks), {_MASK}, "masks", key)
        if files.split is not None:
            images = _listed(images, Path(files.split), key)
        self.left_out = [path for stem, path in images.items() if stem not in masks]
        self._pairs = [(path, masks[stem]) for stem, path in images.items() if stem in masks]
        if not self._pairs:
            raise ConfigError(
                f"{key}: none of the {len(images)} images has a mask: for {self.left_out[0]} there "
                f"is no {Path(files.masks) / _stem(self.left_out[0], Path(files.images))}{_MASK}; "
                "masks have the names of their images"
            )
        self._probe(key)
        for note in self.notes():
            log.warning("%s", note)

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """The image's file, below the folder of images."""
        return str(self._pairs[index][0].relative_to(self.files.images))

    def load(self, index: int) -> Sample:
        """Read, check and augment one sample.

        Raises:
            BadSample: the image or its mask cannot be read, or they do not fit.
        """
        sample = self.read(index)
        return sample if self.augment is None else self.augment(sample)

    def read(self, index: int) -> Sample:
        """`load` without augmentation; draws nothing."""
        try:
            return self._read(index)
        except BadSample as bad:
            raise bad.at(self.name(index)) from None

    def _read(self, index: int) -> Sample:
        path, mask_path = self._pairs[index]
        pixels = decode_image(_bytes(path), max_pixels=self._data.max_pixels)
        zero_is_unlabelled = self._data.zero_is_unlabelled
        mask = decode_mask(_bytes(mask_path), self.classes, zero_is_unlabelled=zero_is_unlabelled)
        if mask.shape != pixels.shape[:2]:
            raise BadSample(
                "mask of another size", f"{_by(mask.shape)}, its image is {_by(pixels.shape[:2])}"
            )
        return Sample(pixels.permute(2, 0, 1).contiguous(), mask, self.name(index))

    def identity(self) -> dict[str, Any]:
        """What the set is, whatever its path: how many images, and a digest of their names."""
        names = "\n".join(self.name(index) for index in range(len(self)))
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        return {"samples": len(self), "fingerprint": digest}

    def describe(self) -> dict[str, int | float | str]:
        """Facts about it."""
        return {"kind": "masks", "samples": len(self)}

    def notes(self) -> list[str]:
        """What is left out, a sentence for each kind."""
        if not self.left_out:
            return []
        few = _few([str(path.relative_to(self.files.images)) for path in self.left_out])
        count = len(self.left_out)
        return [f"{count} images of {self.files.images} have no mask and are left out: {few}"]

    def _probe(self, key: str) -> None:
        """Refuse a set of which no sample is good: its configuration is wrong, and not a file."""
        numbers = range(0, len(self), max(len(self) // _PROBED, 1))[:_PROBED]
        causes: Counter[str] = Counter()
        first = ""
        for index in numbers:
            try:
                self.read(index)
                return
            except BadSample as bad:
                causes[bad.cause] += 1
                first = first or str(bad)
        raise ConfigError(
            f"{key}: none of {len(numbers)} samples can be used: {'; '.join(explain(causes))} "
            f"(the first: {first})"
        )


def decode_mask(data: bytes, classes: int, *, zero_is_unlabelled: bool = False) -> Tensor:
    """The classes in a PNG of one channel: uint8 (H, W), `IGNORED` where there is none.

    Raises:
        BadSample: it cannot be decoded, has colours, or values beyond the classes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode = image.mode
            values = np.asarray(image).astype(np.int64) if mode in _LABELS else None
    except Exception as error:  # Pillow raises whatever it meets in damaged files
        raise BadSample("undecodable mask", words_of(error)) from None
    if values is None:
        raise BadSample("mask in colours", f"its mode is {mode}")
    labelled = values != IGNORED
    if zero_is_unlabelled:
        labelled &= values != 0
        values = values - 1
    beyond = labelled & (values >= classes)
    if beyond.any():
        worst = int(values[beyond].max()) + int(zero_is_unlabelled)
        most = classes - 1 + int(zero_is_unlabelled)
        raise BadSample(
            "mask value beyond the classes", f"{worst}, of {classes} classes up to {most}"
        )
    return torch.from_numpy(np.where(labelled, values, IGNORED).astype(np.uint8))


def read_class_names(path: str | None, classes: int) -> list[str]:
    """The names of the classes, or their numbers.

    Raises:
        ConfigError: the file cannot be read, has another number of names, or one twice.
    """
    key = "data.class_names"
    if path is None:
        return [str(number) for number in range(classes)]
    lines = _lines(Path(path), key)
    if Path(path).suffix == ".json":
        lines = _of_json("\n".join(lines), f"{key}: {path}")
    elif lines and lines[0].startswith("Idx"):  # ADE20k's objectInfo150.txt: a table with a head
        lines = [line.split("\t")[-1].strip() for line in lines[1:]]
    if len(lines) != classes:
        raise ConfigError(
            f"{key}: {path} has {len(lines)} names and model.classes is {classes}; name every "
            "class in a line, in the order of the masks' values, and no background that masks do "
            "not have"
        )
    twice = [name for name, count in Counter(lines).items() if count > 1]
    if twice:
        raise ConfigError(f"{key}: {path} has {_few(twice)} more than once; name classes apart")
    return lines


def _of_json(text: str, place: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or sorted(map(str, values.values())) != sorted(
        map(str, range(len(values)))
    ):
        raise ConfigError(f"{place} must be one JSON object of names with the numbers from 0 on")
    return sorted(values, key=lambda name: int(values[name]))


# --------------------------------------------------------------------------------------- folders


def _stem(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _stems(folder: Path, suffixes: set[str], kind: str, key: str) -> dict[str, Path]:
    """Files below a folder by their path without suffix, sorted."""
    if not folder.is_dir():
        raise ConfigError(f"{key}.{kind}: {folder} is no folder; name the one that has the {kind}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        stem = _stem(path, folder)
        if stem in found:
            raise ConfigError(
                f"{key}.{kind}: {found[stem]} and {path} differ only in their suffix, so that "
                "both have the same mask; rename one"
            )
        found[stem] = path
    if not found:
        raise ConfigError(
            f"{key}.{kind}: {folder} has no {kind} ({', '.join(sorted(suffixes))}), nor have the "
            "folders in it"
        )
    return found


def _listed(images: dict[str, Path], split: Path, key: str) -> dict[str, Path]:
    """The images that a file lists, with or without suffix."""
    suffixes = tuple(_IMAGES | {_MASK})
    names = [
        name.rpartition(".")[0] if name.lower().endswith(suffixes) else name
        for name in _lines(split, f"{key}.split")
    ]
    if not names:
        raise ConfigError(f"{key}.split: {split} lists no image; write a name in each line")
    absent = [name for name in names if name not in images]
    if absent:
        raise ConfigError(
            f"{key}.split: {split} lists {len(absent)} of {len(names)} images that are not in the "
            f"folder of images: {_few(absent)}; write names below that folder"
        )
    return {name: images[name] for name in sorted(set(names))}


def _lines(path: Path, key: str) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{key}: cannot read {path} ({reason})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{path} ({error.strerror})") from None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by(shape: Iterable[int]) -> str:
    height, width = shape
    return f"{width}x{height}"
