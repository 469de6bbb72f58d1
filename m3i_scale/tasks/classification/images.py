"""Images with labels as map-style data sets: folders of classes, and shards with an index."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_scale.config import Source
from m3i_scale.config.classification import ClassificationData, LabelledImages
from m3i_scale.data import StorageClient
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.batch import TensorFields
from m3i_scale.data.decode import decode_file
from m3i_scale.data.make import decode_sample
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.sequential import source_of
from m3i_scale.data.stream import open_index

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}

Transform = Callable[[Tensor], Tensor]  # uint8 (3, H, W) -> float32 (3, S, S), normalised


@dataclass(frozen=True)
class LabelledBatch(TensorFields):
    """B images, float32 (B, 3, S, S), normalised; labels, int64 (B,); names, for messages.

    Of a cache of features, they stand in the place of images: (B, E).
    """

    images: Tensor
    labels: Tensor
    key: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Labelled:
    """One image (3, S, S) with its label."""

    image: Tensor
    label: int
    key: str


class LabelledSet(ABC):
    """A map-style data set of images with labels.

    Args:
        data: its settings.
        classes: number of classes of the classifier.
        transform: what becomes of an image.
    """

    kind: str

    def __init__(self, data: ClassificationData, classes: int, transform: Transform) -> None:
        self.data, self.classes, self._transform = data, classes, transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, int, str]:
        """Image uint8 (H, W, 3), label and name of a sample; raises BadSample."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the set is, whatever its path."""

    def load(self, index: int) -> Labelled:
        """One sample, transformed; torch's global generator decides."""
        image, label, key = self.read(index)
        if label >= self.classes:
            raise BadSample(
                "class beyond the classifier", f"{key} has class {label} of {self.classes}"
            )
        return Labelled(self._transform(image.permute(2, 0, 1)), label, key)

    def collate(self, samples: Sequence[Labelled]) -> LabelledBatch:
        """Put samples into one batch."""
        return LabelledBatch(
            torch.stack([sample.image for sample in samples]),
            torch.tensor([sample.label for sample in samples]),
            tuple(sample.key for sample in samples),
        )

    def describe(self) -> Mapping[str, int | float | str]:
        """For `--dry-run`."""
        return {"kind": self.kind, "samples": len(self)}


class FolderImages(LabelledSet):
    """A folder with a folder of images for each class.

    Raises:
        ValueError: there is none, it has other classes than it should, or no images.
    """

    kind = "folder"

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] | None,
        data: ClassificationData,
        classes: int,
        transform: Transform,
    ) -> None:
        super().__init__(data, classes, transform)
        self.folder = folder
        found = _class_folders(folder)
        order = list(names or found)
        _require_classes(folder, found, order, classes)
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(order):
            own = sorted(
                str(path.relative_to(folder))
                for path in (folder / name).rglob("*")
                if path.suffix.lower() in SUFFIXES
            )
            self.files += own
            labels += [label] * len(own)
        if not self.files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"{folder} has no image ({kinds}) in the folders of its classes")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int, str]:
        """Decode a file."""
        image = decode_file(self.folder / self.files[index], max_pixels=self.data.max_pixels)
        return image, int(self.labels[index]), self.files[index]

    def identity(self) -> dict[str, Any]:
        """A hash of all names and labels."""
        digest = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes())
        return {"samples": len(self), "content": digest.hexdigest()[:16]}


class IndexedImages(LabelledSet):
    """Shards with an index that has categories.

    Raises:
        ValueError: there is none, it has no categories, or more than the classifier has.
    """

    kind = "index"

    def __init__(
        self, source: Source, data: ClassificationData, classes: int, transform: Transform
    ) -> None:
        super().__init__(data, classes, transform)
        if not source.has_category:
            raise ValueError(
                f"{source.index} has no categories; index its shards with --kind category"
            )
        self.source = source
        self._storage = StorageClient(data.storage)
        self.index = open_index(source, self._storage)
        largest = self.index.largest_category
        if largest is not None and largest >= classes:
            raise ValueError(
                f"{source.index} has samples of category {largest}; set model.classes to "
                f"{largest + 1} or more (it is {classes})"
            )
        self._ends = np.cumsum(self.index.counts)
        self._reader: ShardReader | None = None

    def __len__(self) -> int:
        return self.index.samples

    def read(self, index: int) -> tuple[Tensor, int, str]:
        """Read and decode one sample of a shard."""
        if self._reader is None:  # in the process that reads
            self._reader = ShardReader([self.index], self._storage, window_bytes=1, threads=1)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        raw = self._reader.one(index, 0, shard, index - before)
        limit = self.data.max_pixels
        sample = decode_sample(raw, self.source, self.index, max_pixels=limit, faults=[])
        return sample.image, sample.category, sample.key

    def identity(self) -> dict[str, Any]:
        """The index's."""
        counts = {"samples": self.index.samples, "shards": len(self.index.shards)}
        return {**counts, "content": self.index.fingerprint()}

    def describe(self) -> Mapping[str, int | float | str]:
        """With the number of shards and their bytes."""
        return {
            "kind": self.kind,
            "samples": len(self),
            "shards": len(self.index.shards),
            "bytes": int(self.index.shard_bytes.sum()),
        }


def open_images(
    where: LabelledImages, data: ClassificationData, classes: int, transform: Transform
) -> LabelledSet:
    """Open a data set of the configuration; raises ValueError where it cannot be used."""
    if where.folder is not None:
        names = read_names(data.class_names) if data.class_names else None
        return FolderImages(Path(where.folder), names, data, classes, transform)
    assert where.index is not None
    source = source_of(where.index, StorageClient(data.storage))
    source = source.model_copy(update={"kind": "category"}) if source.has_category else source
    return IndexedImages(source, data, classes, transform)


def read_names(path: str) -> list[str]:
    """Names of classes, one in each line; raises ValueError where the file cannot be used."""
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"data.class_names: {path} cannot be read ({error})") from None
    names = [name for name in names if name]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data.class_names: {path} has {twice!r} twice; name each class once")
    return names


def _class_folders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror})") from None


def _require_classes(folder: Path, found: list[str], order: list[str], classes: int) -> None:
    odd = sorted(set(found) ^ set(order))
    if odd:
        where = "in data.class_names only" if odd[0] in order else "no line of data.class_names"
        raise ValueError(f"{folder}: class {odd[0]!r} is {where}; {len(odd)} classes differ")
    if len(order) != classes:
        raise ValueError(
            f"{folder} has {len(order)} folders of classes and model.classes is {classes}; set it "
            f"to {len(order)}, or name all classes in data.class_names"
        )
