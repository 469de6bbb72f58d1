"""Features of a frozen backbone on disk: computed once, by all ranks, and read in every epoch.

FOLDER/KEY/cache.json                       what the features are of; KEY is its hash
FOLDER/KEY/train-VIEW-NUMBER.safetensors    ROWS images each, in the order of the set
FOLDER/KEY/test-0-NUMBER.safetensors

A file appears whole or not at all, so that a cache which was interrupted is gone on with, on any
number of ranks. Other weights, images or preparation have another key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from m3i_scale.cluster.launch import World, from_rank_0, gather_objects, os_error_sentence
from m3i_scale.config import ConfigError
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.make import BadSampleLimit, TooManyBadSamples
from m3i_scale.data.map_stream import load_ahead
from m3i_scale.data.order import hash64
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.stop import StoppedEarly
from m3i_scale.tasks.classification.images import (
    FolderImages,
    Labelled,
    LabelledBatch,
    LabelledSet,
)

log = logging.getLogger(__name__)

ROWS = 8192  # images of a file
FORMAT = 1
Encode = Callable[[Tensor], Tensor]  # images (B, 3, S, S) on the CPU -> features (B, E) there
_EPSILON = 1e-6  # of a variance
# Causes that may be gone tomorrow: a cache must not go on leaving such images out.
_PASSING = {
    "unreadable file", "missing shard", "forbidden shard", "unreadable shard", "truncated shard",
}  # fmt: skip


class Statistics(NamedTuple):
    """Mean and standard deviation of each feature over a set, float32 (E,)."""

    mean: Tensor
    std: Tensor


class Part(NamedTuple):
    """One file: images `rows` of a set, in one view."""

    view: int
    number: int
    rows: range


@dataclass
class CachedSet:
    """A map-style data set of features, in the place of a data set of images.

    Args:
        images: what the features are of.
        name: train or test.
        views: features of each image, of which `load` draws one.
        width: E.
        dtype: of the files.
        seed: of the views.

    Attributes:
        folder: of the cache; set before anything is loaded.
        statistics: with which features are standardised; None: they are not.
    """

    images: LabelledSet
    name: str
    views: int
    width: int
    dtype: torch.dtype
    seed: int
    folder: Path | None = None
    statistics: Statistics | None = None
    _open: dict[Path, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Labelled:
        """Features float32 (E,) of one image and its label; torch's global generator decides."""
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        file = self._read(Part(view, index // ROWS, range(0)))
        row = index % ROWS
        if row in file["faults"]:
            raise BadSample(*file["faults"][row])
        features = file["features"][row].float()
        if self.statistics is not None:
            features = (features - self.statistics.mean) / self.statistics.std
        return Labelled(features, int(file["labels"][row]), f"image {index}")

    def collate(self, samples: Sequence[Labelled]) -> LabelledBatch:
        """Put samples into one batch."""
        return self.images.collate(samples)

    def identity(self) -> Mapping[str, Any]:
        """Of the images, and how many views they have."""
        return {**self.images.identity(), "views": self.views}

    def describe(self) -> Mapping[str, int | float | str]:
        """Of the images."""
        return {**self.images.describe(), "kind": "features"}

    # ------------------------------------------------------------------------------------ files

    def parts(self) -> list[Part]:
        """All files."""
        starts = range(0, len(self), ROWS)
        return [
            Part(view, number, range(start, min(start + ROWS, len(self))))
            for view in range(self.views)
            for number, start in enumerate(starts)
        ]

    def path(self, part: Part) -> Path:
        """Of a file."""
        assert self.folder is not None
        return self.folder / f"{self.name}-{part.view}-{part.number:05d}.safetensors"

    def missing(self) -> list[Part]:
        """Files that are not there, or cannot be read; the latter are named."""
        absent = []
        for part in self.parts():
            try:
                with safe_open(self.path(part), "pt") as file:
                    shape = file.get_slice("features").get_shape()
                if shape == [len(part.rows), self.width]:
                    continue
                log.warning("%s has %s features; computing them again", self.path(part), shape)
            except FileNotFoundError:
                pass
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged (%s); computing it again", self.path(part), error)
            absent.append(part)
        return absent

    def _read(self, part: Part) -> dict[str, Any]:
        """A file, whose features are mapped into memory and shared by all processes of a node."""
        path = self.path(part)
        if path not in self._open:
            with safe_open(path, "pt") as file:
                faults = json.loads(file.metadata()["faults"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._open[path] = {**tensors, "faults": {int(row): f for row, f in faults.items()}}
        return self._open[path]

    def measure(self) -> Statistics:
        """Of all features that can be used, in the order of the files."""
        count = 0
        total, squares = torch.zeros(2, self.width, dtype=torch.float64)
        for part in self.parts():
            file = self._read(part)
            count += len(part.rows) - len(file["faults"])
            total += file["sum"]
            squares += file["squares"]
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp(min=0)
        return Statistics(mean.float(), (variance + _EPSILON).sqrt().float())

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which opens the files itself."""
        return {**self.__dict__, "_open": {}}


class _Loaded(NamedTuple):
    """Images (n, 3, S, S), labels, and (row, cause, text) of those that cannot be used."""

    images: Tensor
    labels: list[int]
    faults: list[tuple[int, str, str]]


class _Views(Dataset[_Loaded]):
    """What runs in a worker: the images of one view; a black one for what cannot be used."""

    def __init__(self, cached: CachedSet, view: int) -> None:
        self._images, self._seed, self._view = cached.images, cached.seed, view

    def __getitem__(self, rows: list[int]) -> _Loaded:
        images: list[Tensor] = []
        labels: list[int] = []
        faults: list[tuple[int, str, str]] = []
        size = self._images.data.image_size
        for row in rows:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hash64(self._seed, self._view, row)[0]))
                try:
                    one = self._images.load(row)
                except BadSample as bad:
                    faults.append((row, bad.cause, str(bad).removeprefix(f"{bad.cause}: ")))
                    one = Labelled(torch.zeros(3, size, size), 0, "")
            images.append(one.image)
            labels.append(one.label)
        return _Loaded(torch.stack(images), labels, faults)


def compute(
    sets: Sequence[CachedSet],
    encode: Callable[[], Encode],
    world: World,
    *,
    batch: int,
    stopping: Callable[[], bool],
) -> None:
    """Compute what is missing of caches, each rank some files (a collective).

    Args:
        sets: whose `folder` is set.
        encode: loads the backbone, where there is anything to do.
        world: this rank.
        batch: images encoded at once.
        stopping: whether the run was asked to stop.

    Raises:
        ConfigError: images cannot be read, or too many of them; or a file cannot be written.
        StoppedEarly: the run was asked to stop.
    """
    own = [(number, part) for number, one in enumerate(sets) for part in one.missing()]
    todo = gather_objects(own, world)[0]
    run = encode() if todo else None
    limits = [BadSampleLimit(one.images.data.max_bad_rate, one.images.data.bad_window)
              for one in sets]  # fmt: skip

    def attempt(number: int, part: Part) -> str:
        assert run is not None
        try:
            _compute_part(sets[number], part, run, batch, limits[number])
        except OSError as error:
            return os_error_sentence(error, sets[number].folder)
        except (ValueError, TooManyBadSamples) as error:
            return str(error)
        return ""

    for first in range(0, len(todo), world.size):
        mine = first + world.rank
        problem = attempt(*todo[mine]) if mine < len(todo) else ""
        said = gather_objects((problem, stopping()), world)
        done = min(first + world.size, len(todo))
        _go_on_or_raise(said, done, len(todo))
        if world.is_main:
            log.info("features: %d of %d files written to %s", done, len(todo), sets[0].folder)
    _require_seen(sets, world)


def _go_on_or_raise(said: Sequence[tuple[str, bool]], done: int, total: int) -> None:
    problems = [words for words, _ in said if words]
    if problems:
        raise ConfigError(f"data.features: {problems[0]}")
    if any(stopped for _, stopped in said):
        raise StoppedEarly(
            f"asked to stop after {done} of {total} files of features; the next start computes "
            "the others"
        )


def _require_seen(sets: Sequence[CachedSet], world: World) -> None:
    for one in sets:
        absent = gather_objects(len(one.missing()), world)
        if any(absent):
            rank = next(rank for rank, count in enumerate(absent) if count)
            raise ConfigError(
                f"data.features.folder: rank {rank} does not see {absent[rank]} files of "
                f"{one.folder} that were written; name a folder that all nodes share"
            )


def _compute_part(
    cached: CachedSet, part: Part, encode: Encode, batch: int, limit: BadSampleLimit
) -> None:
    """Write one file."""
    blocks = [list(part.rows[start : start + batch]) for start in range(0, len(part.rows), batch)]
    features: list[Tensor] = []
    labels: list[int] = []
    faults: dict[int, list[str]] = {}
    workers = cached.images.data.workers
    for loaded in load_ahead(_Views(cached, part.view), blocks, workers):
        for row, cause, text in loaded.faults:
            if cached.name == "test":
                raise ValueError(
                    f"a sample of the test set cannot be used ({cause}: {text}): mend it, or leave "
                    "it out of the set"
                )
            if cause in _PASSING:
                raise ValueError(f"{cause}: {text}; make it readable and start again")
            log.warning("view %d: left out a sample (%s: %s)", part.view, cause, text)
            limit.note(cause, text, replaced=True)
            faults[row - part.rows.start] = [cause, text]
        limit.passed(len(loaded.labels))
        features.append(encode(loaded.images).to(cached.dtype))
        labels += loaded.labels
    found = torch.cat(features)
    usable = [row for row in range(len(found)) if row not in faults]
    exact = found[usable].double()
    tensors = {
        "features": found,
        "labels": torch.tensor(labels),
        "sum": exact.sum(0),
        "squares": exact.square().sum(0),
    }
    _save(cached.path(part), tensors, {"faults": json.dumps(faults)})


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file that is whole or absent, whoever else writes it at the same time."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        save_file(tensors, new, metadata)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except SafetensorError as error:  # how it reports what the operating system refuses
        raise ValueError(f"{new} cannot be written ({error})") from error
    finally:
        new.unlink(missing_ok=True)


def open_folder(parent: Path, content: Mapping[str, Any], world: World) -> Path:
    """The folder of a cache, made where it does not exist (a collective).

    Args:
        parent: of all caches.
        content: what decides the features, as JSON; of rank 0.
        world: this rank.

    Raises:
        ConfigError: it cannot be made.
    """
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True, indent=1)
    text = gather_objects(text, world)[0]
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "cache.json", text + "\n")

    from_rank_0(world, make, folder)
    return folder


def content_of(images: LabelledSet) -> dict[str, Any]:
    """What an image set is, with the sizes and times of its files: its pixels may have changed."""
    return {**images.identity(), **dict(_stamps(images))}


def _stamps(images: LabelledSet) -> Iterator[tuple[str, str]]:
    if isinstance(images, FolderImages):  # an index says it of its shards
        digest = hashlib.sha256()
        for name in images.files:
            found = (images.folder / name).stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        yield "files", digest.hexdigest()[:16]
