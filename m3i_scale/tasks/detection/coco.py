"""COCO's and LVIS's annotation files: read once, checked entry by entry, kept as bytes.

What is wrong with a whole file ends in a sentence (ValueError).  Single entries that cannot be used
are left out, named and counted (`CocoFile.findings`).  The ground truth of an evaluation keeps all
entries that pycocotools would take: empty boxes, boxes outside their image, crowds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m3i_scale.tasks.detection.annotation_faults import (
    CUT,
    EMPTY,
    OUTSIDE,
    Box,
    ImageEntry,
    clipped,
    fault,
    numbers,
    whole,
)

Entry = dict[str, Any]
_STILL_TRUE = {EMPTY, OUTSIDE}  # not trained on, and yet part of the ground truth
_EXAMPLES = 3
_LONGEST_NAME = 100  # of a file, in a message


class Category(NamedTuple):
    """One category; `frequency` is LVIS's r, c or f, otherwise empty."""

    id: int
    name: str
    frequency: str = ""


class Annotation(NamedTuple):
    """One object of an image; `category` counts from 0, in the order of the categories' ids."""

    category: int
    box: Box
    crowd: bool
    segmentation: Any  # polygons, run lengths, or None


@dataclass
class Findings:
    """What was left out of a file and why: causes, their counts and first examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, what: str) -> None:
        """Count one more."""
        self.counts[cause] += 1
        shown = self.examples.setdefault(cause, [])
        if len(shown) < _EXAMPLES:
            shown.append(what)

    def lines(self) -> list[str]:
        """`left out 17 empty box: annotation 3 of image 5, ...`, the most frequent first."""
        return [self._line(cause, count) for cause, count in self.counts.most_common()]

    def _line(self, cause: str, count: int) -> str:
        shown = self.examples[cause]
        names = ", ".join(shown) + (", ..." if count > len(shown) else "")
        return f"{'cut off' if cause == CUT else 'left out'} {count:,} {cause}: {names}"


class CocoFile:
    """The images, categories and usable annotations of one file.

    Annotations are kept as JSON bytes, one piece an image: objects of Python would be copied into
    every reading process.
    """

    def __init__(
        self,
        path: str,
        images: Sequence[ImageEntry],
        categories: Sequence[Category],
        pieces: Sequence[Sequence[Entry]],
        findings: Findings,
        lists: Mapping[int, Entry],
    ) -> None:
        self.path = path
        self.images = list(images)
        self.categories = list(categories)
        self.findings = findings
        self.lvis = any(category.frequency for category in categories) and bool(lists)
        self._numbers = {category.id: i for i, category in enumerate(categories)}
        self._lists = lists
        encoded = [json.dumps(piece, separators=(",", ":")).encode() for piece in pieces]
        self._ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def annotated(self) -> bool:
        """Whether any image has an annotation; the files of test images have none."""
        return bool(len(self._ends)) and len(self._bytes) > 2 * len(self._ends)  # b"[]" each

    def entries(self, index: int) -> list[Entry]:
        """The entries of an image as they stand in the file, crowds and empty boxes included."""
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._bytes[start : int(self._ends[index])].tobytes())

    def annotations(self, index: int) -> list[Annotation]:
        """The objects of an image that can be trained on, crowds included."""
        image = self.images[index]
        found = []
        for entry in self.entries(index):
            box = clipped(entry["bbox"], image)
            if box is not None:
                crowd, shape = bool(entry.get("iscrowd")), entry.get("segmentation")
                number = self._numbers[entry["category_id"]]
                found.append(Annotation(number, box, crowd, shape or None))
        return found

    def image_counts(self) -> list[int]:
        """Of each category, the number of images that show it."""
        counts = [0] * len(self.categories)
        for index in range(len(self)):
            for number in {self._numbers[entry["category_id"]] for entry in self.entries(index)}:
                counts[number] += 1
        return counts

    def ground_truth(self) -> dict[str, Any]:
        """The file as evaluators take it, annotations numbered from 1 (0 means unmatched there)."""
        images = [
            {"id": i.id, "height": i.height, "width": i.width, **self._lists.get(i.id, {})}
            for i in self.images
        ]
        annotations: list[Entry] = []
        for index in range(len(self)):
            for entry in self.entries(index):
                annotations.append({**entry, "id": len(annotations) + 1})
        categories = [
            {"id": c.id, "name": c.name} | ({"frequency": c.frequency} if c.frequency else {})
            for c in self.categories
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

    def fingerprint(self) -> str:
        """A hash of images, categories and annotations, whatever the file's path."""
        digest = hashlib.sha256(repr((self.images, self.categories)).encode())
        digest.update(self._bytes.tobytes())
        return digest.hexdigest()[:16]

    def select(self, kept: Sequence[int]) -> CocoFile:
        """The same file with only these images."""
        return CocoFile(
            self.path,
            [self.images[i] for i in kept],
            self.categories,
            [self.entries(i) for i in kept],
            self.findings,
            self._lists,
        )


def read_coco(path: str | os.PathLike[str], *, masks: bool = False) -> CocoFile:
    """Read and check an annotation file.

    Args:
        path: the JSON file.
        masks: whether every object must have a mask.

    Raises:
        ValueError: there is no such file; it is no JSON, or lacks a list; two images or categories
            have one id; no annotation can be used.
    """
    content = _content(path)
    findings = Findings()
    categories = _categories(path, content["categories"])
    images, lists = _images(path, content["images"], findings)
    pieces: dict[int, list[Entry]] = {image.id: [] for image in images}
    by_id = {image.id: image for image in images}
    known = {category.id for category in categories}
    trained = 0
    for number, entry in enumerate(content["annotations"]):
        cause = fault(entry, by_id, known, masks)
        if cause is not None:
            findings.add(cause, _named(entry, number))
        if cause is None or cause in _STILL_TRUE | {CUT}:
            pieces[entry["image_id"]].append(_complete(entry))
        trained += cause is None or cause == CUT
    if content["annotations"] and not trained:
        raise ValueError(f"{path} has no annotation that can be used: {findings.lines()[0]}")
    return CocoFile(
        os.fspath(path), images, categories, [pieces[i.id] for i in images], findings, lists
    )


def require_same_categories(train: CocoFile, val: CocoFile) -> None:
    """Raise ValueError unless both files have the same categories under the same ids."""
    ours, theirs = ({c.id: c.name for c in file.categories} for file in (train, val))
    if ours != theirs:
        odd = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        first = odd[0]
        raise ValueError(
            f"{val.path} has other categories than {train.path}: {len(odd)} differ, first id "
            f"{first} ({ours.get(first, 'absent')!r} in training, {theirs.get(first, 'absent')!r} "
            "in validation); both files must list the same ids and names"
        )


def absent_files(images: Iterable[ImageEntry], folder: str | os.PathLike[str]) -> list[int]:
    """Positions of listed images whose file is not there; each folder is listed once.

    Raises:
        ValueError: the folder does not exist; a name leads out of it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: it should hold the images of the annotation file")
    base = os.path.join(os.path.abspath(root), "")
    there: dict[str, frozenset[str]] = {}
    absent = []
    for position, image in enumerate(images):
        path = os.path.abspath(os.path.join(base, image.file))
        if not path.startswith(base):
            raise ValueError(
                f"the file_name {short(image.file)!r} of image {image.id} leads out of {root}: "
                "name the folder that holds all images, and files relative to it"
            )
        parent, name = os.path.split(path)
        if parent not in there:
            there[parent] = frozenset(os.listdir(parent) if os.path.isdir(parent) else [])
        if name not in there[parent]:
            absent.append(position)
    return absent


def short(name: str) -> str:
    """A file's name as messages show it."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _content(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file: name the annotation file (COCO's or LVIS's JSON)")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or no JSON ({' '.join(str(error).split())}): download it again"
        ) from None
    wanted = ("images", "annotations", "categories")
    lacking = [
        name
        for name in wanted
        if not isinstance(content, dict) or not isinstance(content.get(name), list)
    ]
    if lacking:
        raise ValueError(
            f"{path} is no annotation file of COCO or LVIS: it has no list {', '.join(lacking)}"
        )
    for name in ("images", "categories"):
        if not content[name]:
            raise ValueError(f"{path} lists no {name}: it is empty, or of another kind")
    return content


def _categories(path: str | os.PathLike[str], entries: Sequence[Any]) -> list[Category]:
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or not whole(entry.get("id")):
            raise ValueError(f"{path}: the category {str(entry)[:60]} has no whole number as id")
        frequency = entry.get("frequency", "")
        name = str(entry.get("name", entry["id"]))
        found.append(Category(entry["id"], name, frequency if frequency in ("r", "c", "f") else ""))
    twice = [i for i, count in Counter(c.id for c in found).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: two categories have the id {twice[0]}; give each its own")
    return sorted(found)


def _images(
    path: str | os.PathLike[str], entries: Sequence[Any], findings: Findings
) -> tuple[list[ImageEntry], dict[int, Entry]]:
    """Usable images, and of LVIS what is known to be absent from them or not labelled in full."""
    images, lists = [], {}
    for position, entry in enumerate(entries):
        image = _image(entry)
        if image is None:
            findings.add("image without id, file_name, height or width", f"entry {position}")
            continue
        images.append(image)
        keys = ("neg_category_ids", "not_exhaustive_category_ids")
        if all(isinstance(entry.get(key), list) for key in keys):
            lists[image.id] = {key: entry[key] for key in keys}
    twice = [i for i, count in Counter(image.id for image in images).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: two images have the id {twice[0]}; give each its own")
    if not images:
        raise ValueError(f"{path} has no image that can be used: {findings.lines()[0]}")
    return images, lists


def _image(entry: object) -> ImageEntry | None:
    if not isinstance(entry, dict):
        return None
    file = entry.get("file_name")
    if file is None and isinstance(entry.get("coco_url"), str):
        file = "/".join(entry["coco_url"].split("/")[-2:])  # LVIS: train2017/000000000009.jpg
    if not (whole(entry.get("id")) and isinstance(file, str) and file):
        return None
    if not all(whole(entry.get(side)) and entry[side] > 0 for side in ("height", "width")):
        return None
    return ImageEntry(entry["id"], file, entry["height"], entry["width"])


def _named(entry: object, position: int) -> str:
    if not isinstance(entry, dict):
        return f"entry {position}"
    return f"annotation {entry.get('id', position)} of image {entry.get('image_id')}"


def _complete(entry: Entry) -> Entry:
    """An annotation with the keys that evaluators read."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    kept = {key: entry[key] for key in keys if entry.get(key) is not None}
    area = entry.get("area")
    if not numbers([area]):
        area = max(0.0, entry["bbox"][2]) * max(0.0, entry["bbox"][3])
    return {**kept, "area": area, "iscrowd": int(bool(entry.get("iscrowd")))}
