"""A source in the order of its index, without augmentation: for evaluation and inspection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3i_scale import paths
from m3i_scale.config import MAX_PIXELS, Source
from m3i_scale.data import views
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.index import Index
from m3i_scale.data.make import Fault, Sample, decode_sample
from m3i_scale.data.order import Located
from m3i_scale.data.reader import Raw, ShardReader
from m3i_scale.data.storage import StorageClient
from m3i_scale.data.stream import MIB, open_index

_BLOCK = 64


@dataclass
class Labelled:
    """N images with what is known of them."""

    images: Tensor  # uint8 (N, S, S, 3), the largest central square
    captions: list[str]  # "" where the source has none
    category: Tensor  # int64 (N,), -1 where the source has none
    key: list[str]  # "source/shard/key"


def source_of(index: str, storage: StorageClient | None = None) -> Source:
    """The source behind an index file, named after it, of the kind that all its samples allow.

    Raises:
        ValueError: there is no such index, or it holds no usable sample.
    """
    try:
        opened = Index(index, storage)
    except FileNotFoundError:
        raise ValueError(f"there is no index {index}; make one with `m3i shards index`") from None
    if opened.kind is None:
        raise ValueError(
            f"{index} holds no usable sample with a caption or a category; index its shards again "
            "and see what is left out"
        )
    return Source(name=Path(index).stem, index=paths.literal(index), kind=opened.kind)


def load_labelled(
    source: Source,
    image_size: int,
    *,
    limit: int | None = None,
    storage: StorageClient | None = None,
) -> Labelled:
    """Read the first `limit` samples of a source (all if None), central squares resized to S.

    Samples that cannot be used are left out.
    """
    images, samples = [], []
    for _, sample in walk(source, limit=limit, storage=storage):
        if isinstance(sample, Sample):
            images.append(central_square(sample.image, image_size))
            samples.append(sample)
    if not samples:
        raise ValueError(f"source {source.name!r} ({source.index}) has no usable sample")
    return Labelled(
        torch.stack(images),
        [sample.text or "" for sample in samples],
        torch.tensor([sample.category for sample in samples], dtype=torch.int64),
        [sample.key for sample in samples],
    )


def central_square(image: Tensor, size: int) -> Tensor:
    """The largest central square of uint8 (H, W, 3), resized to (size, size, 3)."""
    out = torch.empty((1, size, size, 3), dtype=torch.uint8)
    crop = views.Crop(*views.central_crop(*image.shape[:2]), flip=False)
    (target,) = views.channels_first(out)
    views.resize_into(target, image, crop)
    return out[0]


def walk(
    source: Source,
    *,
    start: int = 0,
    limit: int | None = None,
    storage: StorageClient | None = None,
    max_pixels: int = MAX_PIXELS,
    faults: list[Fault] | None = None,
    index: Index | None = None,
    threads: int = 1,
) -> Iterator[tuple[Raw, Sample | BadSample]]:
    """Every sample of a source in index order, decoded, or the reason why it cannot be.

    Of several captions a sample's `text` is the first one, and `others` are the others.
    `index` is the source's, if it is open already; so many `threads` decode.
    """
    storage = storage or StorageClient()
    index = index or open_index(source, storage)
    stop = index.samples if limit is None else min(index.samples, start + limit)
    reader = ShardReader([index], storage, window_bytes=16 * MIB, threads=2)
    found = faults if faults is not None else []
    ends = np.cumsum(index.counts)

    def blocks() -> Iterator[Located]:
        for first in range(start, stop, _BLOCK):
            number = np.arange(first, min(first + _BLOCK, stop), dtype=np.int64)
            shard = np.searchsorted(ends, number, side="right")
            sample = number - (ends[shard] - index.counts[shard])
            zero = np.zeros_like(number)
            yield Located(number, zero, zero, shard, sample)

    def decode(raw: Raw) -> tuple[Raw, Sample | BadSample]:
        try:
            return raw, decode_sample(
                raw, source, index, max_pixels=max_pixels, faults=found, every=True
            )
        except BadSample as bad:
            return raw, bad

    raws = itertools.chain.from_iterable(reader.stream(blocks()))
    if threads == 1:
        yield from map(decode, raws)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="m3i-decode") as pool:
        while some := list(itertools.islice(raws, threads)):  # no more images than that at once
            yield from pool.map(decode, some)
