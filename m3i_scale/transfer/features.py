"""Samples to features, in one pass over the data for any number of networks.

Each batch of images is read, decoded and dropped; only features stay in memory, and only they limit
the size of an evaluation set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from m3i_scale.config import Data, Source
from m3i_scale.data import StorageClient
from m3i_scale.data.index import Index
from m3i_scale.data.make import Sample
from m3i_scale.data.sequential import central_square, source_of, walk
from m3i_scale.models.tokenizer import Tokenizer
from m3i_scale.objective.likelihoods import normalise
from m3i_scale.objective.m3i import M3I


class Place(NamedTuple):
    """Where an image can be read again."""

    source: Source
    number: int  # in index order


class Known(NamedTuple):
    """What is known of N images besides their pixels."""

    captions: list[str]  # "" where there is none
    category: Tensor  # int64 (N,), -1 where there is none
    places: list[Place]

    def __len__(self) -> int:
        return len(self.captions)


class Encoded(NamedTuple):
    """What one set of networks says of N images; all float32 on the CPU."""

    pooled: Tensor  # (N, E): the feature that kNN and the linear probe see
    text: Tensor | None  # (N, T) unit length, the prediction of the text; None without a text tower
    category: Tensor | None  # (N, C) scores of the pre-trained classifier; None without one


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


@torch.inference_mode()
def encode_images(networks: M3I, images: Tensor) -> Encoded:
    """Encode prepared images (B, 3, S, S), whole and clean: all tokens are pooled.

    Computed in the precision of the networks' weights.
    """
    backbone = networks.student.backbone
    tokens = backbone.features(images.to(next(networks.parameters()).dtype))  # (B, N, D)
    pooled = backbone.pool(tokens)  # (B, E)
    text = category = None
    if hasattr(networks, "text_tower"):
        text = normalise(networks.text_projection(pooled), "l2").float().cpu()
    if hasattr(networks, "category_head"):
        category = networks.category_head(pooled).float().cpu()
    # Where all targets are dense nothing trains the pooling: the mean of the tokens is the feature.
    feature = pooled if networks.objective.pooled else tokens.float().mean(1)
    return Encoded(feature.float().cpu(), text, category)


@torch.inference_mode()
def encode_captions(
    networks: M3I, tokenizer: Tokenizer, captions: Sequence[str], max_length: int, batch: int = 256
) -> Tensor:
    """Embed M captions: float32 (M, T) of unit length, on the CPU."""
    device = next(networks.parameters()).device
    tokens, mask = tokenizer(captions, max_length)
    order = torch.argsort(mask.sum(1))  # neighbours of similar length need little padding
    parts = []
    for rows in order.split(batch):
        longest = int(mask[rows].sum(1).max())
        cut = (x[rows, :longest].to(device) for x in (tokens, mask))
        parts.append(normalise(networks.text_tower(*cut), "l2").float().cpu())
    return torch.cat(parts)[torch.argsort(order)]


def encode_sources(
    networks: Mapping[str, M3I],
    sources: Sequence[Source],
    pixels: Pixels,
    *,
    batch: int = 64,
    limit: int | None = None,
    storage: StorageClient | None = None,
    progress: str | None = None,
) -> tuple[Known, dict[str, Encoded]]:
    """Encode the first `limit` samples of every source (all if None) with every set of networks.

    Args:
        networks: by name, all on one device.
        sources: what to read; unusable samples are left out.
        pixels: how images are prepared.
        batch: images at once.
        limit: most samples taken of each source.
        storage: how shards are read.
        progress: title of a progress bar; None for no bar.

    Raises:
        ValueError: there is no usable sample, or a source cannot be read.
    """
    parts: dict[str, list[Encoded]] = {name: [] for name in networks}
    captions: list[str] = []
    category: list[int] = []
    places: list[Place] = []
    device = next(next(iter(networks.values())).parameters()).device
    sizes = [Index(source.index, storage).samples for source in sources]
    total = sum(min(limit or size, size) for size in sizes)
    # The networks run side by side, each in a thread, while the next batch is being decoded.
    with (
        tqdm(total=total, desc=progress, unit="img", disable=progress is None) as bar,
        ThreadPoolExecutor(len(networks)) as pool,
    ):
        pending: dict[str, Future[Encoded]] = {}
        for samples in _batches(_usable(sources, limit, storage), batch):
            images = torch.stack([central_square(s.image, pixels.size) for _, s in samples])
            prepared = pixels.prepare(images, device)
            _collect(pending, parts)
            pending = {n: pool.submit(encode_images, m, prepared) for n, m in networks.items()}
            captions += [sample.text or "" for _, sample in samples]
            category += [sample.category for _, sample in samples]
            places += [place for place, _ in samples]
            bar.update(len(samples))
        _collect(pending, parts)
    if not places:
        names = ", ".join(source.index for source in sources)
        raise ValueError(f"there is no usable sample in {names}")
    known = Known(captions, torch.tensor(category, dtype=torch.int64), places)
    return known, {name: _join(encoded) for name, encoded in parts.items()}


def read_image(place: Place, size: int, storage: StorageClient | None = None) -> Tensor:
    """Read one image again: uint8 (S, S, 3), its largest central square."""
    _, sample = next(walk(place.source, start=place.number, limit=1, storage=storage))
    assert isinstance(sample, Sample)  # it was usable before
    return central_square(sample.image, size)


def open_storage(data: Data) -> StorageClient:
    """Read shards as the run does, without its cache: evaluation reads everything once."""
    return StorageClient(data.storage.model_copy(update={"cache": None}))


def open_source(path: str, storage: StorageClient | None = None) -> Source:
    """The source behind an index file, of the kind that its samples allow.

    Raises:
        ValueError: there is no such index, or it holds no usable sample.
    """
    return source_of(path, storage).model_copy(update={"name": path})


def _usable(
    sources: Sequence[Source], limit: int | None, storage: StorageClient | None
) -> Iterator[tuple[Place, Sample]]:
    for source in sources:
        for number, (_, sample) in enumerate(walk(source, limit=limit, storage=storage)):
            if isinstance(sample, Sample):
                yield Place(source, number), sample


def _batches(
    samples: Iterator[tuple[Place, Sample]], size: int
) -> Iterator[list[tuple[Place, Sample]]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _collect(pending: Mapping[str, Future[Encoded]], parts: dict[str, list[Encoded]]) -> None:
    for name, future in pending.items():
        parts[name].append(future.result())


def _join(parts: Sequence[Encoded]) -> Encoded:
    columns = zip(*parts, strict=True)
    return Encoded(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
