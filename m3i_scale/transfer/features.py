"""Samples to features, in one pass over the data for any number of networks.

Each batch of images is read, decoded and dropped; only features stay in memory, and only they limit
the size of an evaluation set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from m3i_scale.config import Data, Source
from m3i_scale.data import StorageClient
from m3i_scale.data.index import Index
from m3i_scale.data.make import Sample
from m3i_scale.data.sequential import central_square, source_of, walk
from m3i_scale.data.stream import open_index
from m3i_scale.models.tokenizer import Tokenizer
from m3i_scale.objective.clean import CleanImages, Texts
from m3i_scale.objective.collectives import rank_and_size
from m3i_scale.transfer.parts import most_of_a_rank, of_all_ranks, own_part, rows_of_all

T = TypeVar("T")


class UnreadableSetError(ValueError):
    """Nothing of an evaluation set can be read; all ranks raise it."""


class Place(NamedTuple):
    """Where an image can be read again."""

    source: Source
    number: int  # in index order


class Label(NamedTuple):
    """What is known of one image."""

    caption: str
    category: int
    others: tuple[str, ...]  # its further captions


class Known(NamedTuple):
    """What is known of N images besides their pixels."""

    captions: list[str]  # "" where there is none
    category: Tensor  # int64 (N,), -1 where there is none
    places: list[Place]
    left_out: list[str]  # samples that cannot be used, and why
    others: Sequence[Sequence[str]] = ()  # further captions of each image; empty: there are none

    def captions_of(self, image: int) -> list[str]:
        """All captions of an image, each once."""
        more = self.others[image] if self.others else ()
        return list(dict.fromkeys(c for c in (self.captions[image], *more) if c))

    def __len__(self) -> int:
        return len(self.captions)


class Encoded(NamedTuple):
    """What one set of networks says of images; all float32 on the CPU.

    Where an evaluation is divided among ranks the features are all of them, and each rank has the
    predictions of its own images only, the rows `own`.
    """

    pooled: Tensor  # (N, E): the feature that kNN and the linear probe see
    text: Tensor | None  # (O, T) unit length, the prediction of the text; None without a text tower
    category: Tensor | None  # (O, C) scores of the pre-trained classifier; None without one
    own: range  # O of the N


@dataclass(frozen=True)
class Opened:
    """A source to be evaluated on."""

    source: Source
    index: Index


class Pixels(NamedTuple):
    """How an image becomes the networks' input."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, data: Data) -> Pixels:
        """As the run saw its images."""
        return cls(data.image_size, data.mean, data.std)

    def prepare(self, images: Tensor, device: torch.device) -> Tensor:
        """Normalise uint8 (B, S, S, 3) -> float32 (B, 3, S, S) with channels last in memory."""
        x = images.to(device).float() / 255
        mean, std = (torch.tensor(c, device=device) for c in (self.mean, self.std))
        return ((x - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def encode_images(
    networks: nn.Module,
    images: Tensor,
    encoder: Literal["student", "teacher"] = "student",
    *,
    heads: bool = True,
) -> Encoded:
    """Encode prepared images (B, 3, S, S), whole and clean: all tokens are pooled.

    Computed in the precision of the networks' weights.

    Args:
        networks: `M3I`, or the engine that drives it.
        images: float32, on the networks' device.
        encoder: of the two, the one that encodes.
        heads: whether text and category are predicted.
    """
    dtype = next(networks.parameters()).dtype
    found = networks(CleanImages(images.to(dtype), encoder, heads))
    text, category = (
        found[name].float().cpu() if name in found else None for name in ("text", "category")
    )
    return Encoded(found["feature"].float().cpu(), text, category, range(len(images)))


@torch.no_grad()
def encode_captions(
    networks: nn.Module,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    max_length: int,
    batch: int = 256,
) -> Tensor:
    """Embed M captions: float32 (M, T) of unit length, on the CPU (a collective of all ranks)."""
    device = next(networks.parameters()).device
    tokens, mask = tokenizer(captions, max_length)
    order = torch.argsort(mask.sum(1))  # neighbours of similar length need little padding
    batches = order.split(batch)
    rank, ranks = rank_and_size()
    found = []
    for number in range(-(-len(batches) // ranks)):  # as many calls on every rank
        mine = number * ranks + rank
        rows = batches[min(mine, len(batches) - 1)]
        longest = int(mask[rows].sum(1).max())
        cut = Texts(*(x[rows, :longest].to(device) for x in (tokens, mask)))
        embedded = networks(cut)["text"].float().cpu()
        found.append(embedded if mine < len(batches) else embedded[:0])
    shares = [torch.cat(batches[r::ranks]) if batches[r::ranks] else order[:0]
              for r in range(ranks)]  # fmt: skip
    every = rows_of_all(torch.cat(found), [len(share) for share in shares], device)
    return every[torch.argsort(torch.cat(shares))]


def encode_sources(
    networks: Mapping[str, nn.Module],
    sources: Sequence[Opened],
    pixels: Pixels,
    *,
    batch: int = 64,
    limit: int | None = None,
    storage: StorageClient | None = None,
    progress: str | None = None,
    encoder: Literal["student", "teacher"] = "student",
    heads: bool = True,
    threads: int = 1,
) -> tuple[Known, dict[str, Encoded]]:
    """Encode the first `limit` samples of every source (all if None) with every set of networks.

    A collective: each rank encodes a part, and calls the networks as often as every other.

    Args:
        networks: by name, all on one device; on several ranks one set.
        sources: what to read; unusable samples are left out.
        pixels: how images are prepared.
        batch: images at once.
        limit: most samples taken of each source.
        storage: how shards are read.
        progress: title of a progress bar; None for no bar.
        encoder: student or teacher.
        heads: whether text and category are predicted.
        threads: images decoded at once.

    Raises:
        UnreadableSetError: there is no usable sample, or a source cannot be read; on all ranks.
    """
    parts: dict[str, list[Encoded]] = {name: [] for name in networks}
    labels: list[Label] = []
    places: list[Place] = []
    left_out: list[str] = []
    device = next(next(iter(networks.values())).parameters()).device
    sizes = [min(limit or one.index.samples, one.index.samples) for one in sources]
    mine, calls = own_part(sum(sizes)), -(-most_of_a_rank(sum(sizes)) // batch)
    reading = _Reading(_usable(sources, sizes, mine, storage, threads, left_out))
    nothing = torch.zeros(1, pixels.size, pixels.size, 3, dtype=torch.uint8)

    def encode(images: Tensor) -> None:
        prepared = pixels.prepare(images, device)
        # Several networks run side by side; engines want the thread that made them.
        run = map if len(networks) == 1 else pool.map
        encoded = run(
            lambda one: encode_images(one, prepared, encoder, heads=heads), networks.values()
        )
        for name, one in zip(networks, encoded, strict=True):
            parts[name].append(one)

    with (
        tqdm(total=len(mine), desc=progress, unit="img", disable=progress is None) as bar,
        ThreadPoolExecutor(len(networks)) as pool,
    ):
        for samples in _ahead(_batches(reading, batch, pixels.size)):
            encode(torch.stack([image for image, _, _ in samples]))
            labels += [label for _, label, _ in samples]
            places += [place for _, _, place in samples]
            bar.update(len(samples))
            calls -= 1
        if rank_and_size()[1] > 1:  # others may have more images that can be used
            for _ in range(calls):
                encode(nothing)
    known, counts = _of_all_ranks(labels, places, left_out, reading.error)
    if not len(known):
        names = ", ".join(one.source.index for one in sources)
        raise UnreadableSetError(f"there is no usable sample in {names}")
    return known, {name: _join(encoded, counts, device) for name, encoded in parts.items()}


def read_image(place: Place, size: int, storage: StorageClient | None = None) -> Tensor:
    """Read one image again: uint8 (S, S, 3), its largest central square."""
    _, sample = next(walk(place.source, start=place.number, limit=1, storage=storage))
    assert isinstance(sample, Sample)  # it was usable before
    return central_square(sample.image, size)


def open_storage(data: Data) -> StorageClient:
    """Read shards as the run does, without its cache: evaluation reads everything once."""
    return StorageClient(data.storage.model_copy(update={"cache": None}))


def open_source(path: str, storage: StorageClient | None = None) -> Opened:
    """The source behind an index file, of the kind that its samples allow.

    Raises:
        ValueError: there is no such index, or it holds no usable sample.
    """
    source = source_of(path, storage).model_copy(update={"name": path})
    return Opened(source, open_index(source, storage or StorageClient()))


class _Reading:
    """An iterator that ends at an error and keeps it, so that collectives can be ended first."""

    def __init__(self, samples: Iterator[tuple[Place, Sample]]) -> None:
        self._samples = samples
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[Place, Sample]]:
        try:
            yield from self._samples
        except (ValueError, OSError) as error:
            self.error = error


def _usable(
    sources: Sequence[Opened],
    sizes: Sequence[int],
    mine: range,
    storage: StorageClient | None,
    threads: int,
    left_out: list[str],
) -> Iterator[tuple[Place, Sample]]:
    """The usable ones of `mine`, which counts through the first samples of all sources."""
    before = 0
    for opened, size in zip(sources, sizes, strict=True):
        source, index = opened.source, opened.index
        low, high = max(mine.start - before, 0), min(mine.stop - before, size)
        before += size
        if low >= high:
            continue
        found = walk(
            source, start=low, limit=high - low, storage=storage, index=index, threads=threads
        )
        for number, (raw, sample) in enumerate(found, low):
            if isinstance(sample, Sample):
                yield Place(source, number), sample
            else:
                where = f"sample {raw.key or number} of {source.name}/{raw.shard_name}"
                left_out.append(f"{where} ({sample})")


def _batches(
    samples: Iterable[tuple[Place, Sample]], count: int, size: int
) -> Iterator[list[tuple[Tensor, Label, Place]]]:
    """Lists of squares (S, S, 3) with what is known of them; images in full size are dropped."""
    squares = (
        (
            central_square(sample.image, size),
            Label(sample.text or "", sample.category, sample.others),
            place,
        )
        for place, sample in samples
    )
    while batch := list(itertools.islice(squares, count)):
        yield batch


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next being made in a thread while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="m3i-decode") as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


def _of_all_ranks(
    labels: list[Label], places: list[Place], left_out: list[str], error: Exception | None
) -> tuple[Known, list[int]]:
    """What is known of the images of all ranks, and how many each rank has (a collective).

    Raises:
        UnreadableSetError: a rank could not read.
    """
    every = of_all_ranks((labels, places, left_out, None if error is None else str(error)))
    problems = [words for *_, words in every if words is not None]
    if problems:
        raise UnreadableSetError(problems[0]) from error
    found = [label for labels, *_ in every for label in labels]
    known = Known(
        [label.caption for label in found],
        torch.tensor([label.category for label in found], dtype=torch.int64),
        [place for _, places, *_ in every for place in places],
        [words for _, _, left_out, _ in every for words in left_out],
        [label.others for label in found],
    )
    return known, [len(labels) for labels, *_ in every]


def _join(parts: Sequence[Encoded], counts: list[int], device: torch.device) -> Encoded:
    rank, _ = rank_and_size()
    own = counts[rank]  # what follows in the parts filled up calls
    pooled, text, category = (
        None if getattr(parts[0], name) is None
        else torch.cat([getattr(part, name) for part in parts])[:own]
        for name in ("pooled", "text", "category")
    )  # fmt: skip
    assert pooled is not None
    first = sum(counts[:rank])
    every = rows_of_all(pooled, counts, device)
    return Encoded(every, text, category, range(first, first + own))
