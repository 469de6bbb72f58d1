"""A source in the order of its index, without augmentation: for evaluation and inspection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m3i_scale.data import views
from m3i_scale.data.decode import MAX_PIXELS, BadSample
from m3i_scale.data.make import Fault, Sample, decode_sample
from m3i_scale.data.order import Located
from m3i_scale.data.reader import Raw, ShardReader
from m3i_scale.data.source import Source
from m3i_scale.data.storage import Storage
from m3i_scale.data.stream import MIB, open_index

_BLOCK = 64


@dataclass
class Labelled:
    """N images with what is known of them."""

    images: Tensor  # uint8 (N, S, S, 3), the largest central square
    captions: list[str]  # "" where the source has none
    category: Tensor  # int64 (N,), -1 where the source has none
    key: list[str]  # "source/shard/key"


def load_labelled(
    source: Source, image_size: int, *, limit: int | None = None, storage: Storage | None = None
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
    storage: Storage | None = None,
    max_pixels: int = MAX_PIXELS,
    faults: list[Fault] | None = None,
) -> Iterator[tuple[Raw, Sample | BadSample]]:
    """Every sample of a source in index order, decoded, or the reason why it cannot be."""
    storage = storage or Storage()
    index = open_index(source, storage)
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

    for raws in reader.stream(blocks()):
        for raw in raws:
            try:
                yield raw, decode_sample(raw, source, index, max_pixels=max_pixels, faults=found)
            except BadSample as bad:
                yield raw, bad
