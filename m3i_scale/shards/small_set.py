"""A small data set of three sources in one folder: captions, categories, and both, held out.

`m3i glyphs` and `m3i icons` draw one each. The held-out pictures carry both labels and are there to
evaluate on.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import webdataset

from m3i_scale import paths
from m3i_scale.config import Source, SourceKind
from m3i_scale.data.index import FORMAT
from m3i_scale.shards.indexing import index_shards

# The sources, by name.
KINDS: dict[str, SourceKind] = {"text": "text", "category": "category", "heldout": "both"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class SmallSet:
    """The three sources of a built folder and the names of the categories."""

    text: Source
    category: Source
    heldout: Source
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """One sample: the image file's bytes and both of its labels."""

    key: str
    jpg: bytes
    caption: str
    category: int


@dataclass(frozen=True)
class SmallSetFolder:
    """A folder of three sources and the file in it that says how they were made.

    Args:
        name: of that file, without `.json`.
        command: which makes the folder, for messages.
    """

    path: Path
    name: str
    command: str

    def holds(self, recipe: Mapping[str, Any]) -> bool:
        """Whether the folder was made by this recipe and this format of the index."""
        if not self._file.exists():
            return False
        return bool(json.loads(self._file.read_text())["recipe"] == {"format": FORMAT, **recipe})

    def write(
        self,
        recipe: Mapping[str, Any],
        splits: Mapping[str, Sequence[Item]],
        draw: Callable[[Item], Picture | None],
        categories: Sequence[str],
        *,
        shards: int,
    ) -> None:
        """Draw each item of each split (names of KINDS) once; None of `draw` leaves an item out."""
        self._file.unlink(missing_ok=True)
        for name, items in splits.items():
            pictures = (picture for picture in map(draw, items) if picture is not None)
            records = list(_records(pictures, name))
            _write_source(self.path / name, name, records, 1 if name == "heldout" else shards)
        content = {"recipe": {"format": FORMAT, **recipe}, "categories": list(categories)}
        self._file.write_text(json.dumps(content, indent=1))

    def load(self) -> SmallSet:
        """The sources.

        Raises:
            ValueError: the folder holds none.
        """
        if not self._file.exists():
            raise ValueError(
                f"{self.path} holds no {self.name}: run `{self.command} --out {self.path}`"
            )
        text, category, heldout = (
            Source(name=name, index=paths.literal(str(self.path / f"{name}.parquet")), kind=kind)
            for name, kind in KINDS.items()
        )
        categories = json.loads(self._file.read_text())["categories"]
        return SmallSet(text, category, heldout, tuple(categories))

    @property
    def _file(self) -> Path:
        return self.path / f"{self.name}.json"


def split_training(
    items: Sequence[Item], category_share: float, seed: int
) -> dict[str, Sequence[Item]]:
    """Shuffle the training items into those with a category and those with a caption.

    Raises:
        ValueError: `category_share` is not between 0 and 1.
    """
    if not 0 < category_share < 1:
        raise ValueError(f"category_share is {category_share}: it must lie between 0 and 1")
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    cut = round(len(shuffled) * category_share)
    return {"category": shuffled[:cut], "text": shuffled[cut:]}


def _records(pictures: Iterable[Picture], name: str) -> Iterator[dict[str, object]]:
    for picture in pictures:
        record: dict[str, object] = {"__key__": picture.key, "jpg": picture.jpg}
        if name != "category":
            record["txt"] = picture.caption
        if name != "text":
            record["cls"] = str(picture.category)
        yield record


def _write_source(folder: Path, name: str, records: list[dict[str, object]], shards: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tars = [str(folder / f"{name}-{shard:03d}.tar") for shard in range(shards)]
    for shard, path in enumerate(tars):
        with webdataset.TarWriter(path, mtime=0) as tar:
            for record in records[shard::shards]:
                tar.write(record)
    index_shards(tars, f"{folder}.parquet", kind=KINDS[name], progress=False)
