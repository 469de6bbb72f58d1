"""Small shards made by hand: tars as foreign tools write them, not by the project's own builder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3i_scale.config import Source, SourceKind
from m3i_scale.shards.indexing import index_shards

THINGS, CATEGORIES = 6, 5  # of `write_images`


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 32), **options: Any) -> bytes:
    """A smooth JPEG of (width, height) whose colours depend on the seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    """A plain tar with the members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def text_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """img2dataset's layout: key.jpg, key.json, key.txt."""
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:09d}.jpg", jpeg(number)),
            (f"{number:09d}.json", b'{"caption": "c%d", "url": "x"}' % number),
            (f"{number:09d}.txt", b"caption %d" % number),
        ]
    return members


def category_members(first: int, count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(first, first + count):
        members += [(f"n{number}.cls", b"%d" % (number % 7)), (f"n{number}.jpg", jpeg(number))]
    return members


def make_source(name: str, index: str, kind: SourceKind, weight: float | None = None) -> Source:
    """A source of the mixture."""
    return Source(name=name, index=index, kind=kind, weight=weight)


def text_source(folder: Path, counts: list[int], name: str = "pairs") -> Source:
    """A text source of shards with the given numbers of samples."""
    return _source(folder, counts, name, "text")


def category_source(folder: Path, counts: list[int], name: str = "labels") -> Source:
    """A category source of shards with the given numbers of samples."""
    return _source(folder, counts, name, "category")


def _source(folder: Path, counts: list[int], name: str, kind: SourceKind) -> Source:
    members = text_members if kind == "text" else category_members
    paths, first = [], 0
    for number, count in enumerate(counts):
        path = folder / name / f"{number:05d}.tar"
        paths.append(str(write_tar(path, members(first, count))))
        first += count
    index = str(folder / f"{name}.parquet")
    index_shards(paths, index, kind=kind, progress=False)
    return make_source(name, index, kind)


def caption(number: int) -> str:
    """The caption of an image of `write_images`; its subject is one of `THINGS`."""
    return f"Thing {'abcdef'[number % THINGS]}, style {number % 4}"


def write_images(folder: Path, name: str, numbers: Iterable[int], kind: SourceKind) -> str:
    """An index of images that are functions of their number, some captioned, some classified."""
    shard = write_tar(folder / f"{name}.tar", _members(numbers, kind))
    index = folder / f"{name}.parquet"
    index_shards([str(shard)], str(index), kind=kind, progress=False)
    return str(index)


def _members(numbers: Iterable[int], kind: str) -> Iterator[tuple[str, bytes]]:
    for number in numbers:
        yield f"{number:05d}.jpg", jpeg(number, (72, 64))
        if kind != "category":
            yield f"{number:05d}.txt", caption(number).encode()
        if kind != "text":
            yield f"{number:05d}.cls", str(number % CATEGORIES).encode()
