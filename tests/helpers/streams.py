"""Streams over small shards, and what they deliver, by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_scale.config import Data, Source, Storage
from m3i_scale.data import StorageClient, Stream
from m3i_scale.data.batch import Batch

Delivered = dict[int, tuple[str, dict[str, Tensor]]]


def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Bytes of the text, padded to 16."""
    ids = torch.zeros(len(texts), 16, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        data = list(text.encode()[:16])
        row[: len(data)] = torch.tensor(data, dtype=torch.int64)
    return ids, ids > 0


def sample_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """Half of 2 x 2 patches, on average."""
    return rng.random((2, 2)) < 0.5


def client(*, first_wait: float = 0.01, **settings: Any) -> StorageClient:
    """A client with settings of `config.Storage` that loses no time between attempts."""
    return StorageClient(Storage(**settings), first_wait=first_wait)


def make_stream(
    sources: Sequence[Source], storage: StorageClient | None = None, **options: Any
) -> Stream:
    """A stream of images of 16 pixels, in small chunks.

    `options` are settings of `config.Data`, or arguments of the stream.
    """
    settings: dict[str, Any] = {"image_size": 16, "chunk_mebibytes": 8192 / 2**20}
    settings |= {name: options.pop(name) for name in [*options] if name in Data.model_fields}
    chosen: dict[str, Any] = {"seed": 3, "lanes": settings.get("lanes", 8), "tokenize": tokenize}
    data = Data(sources=list(sources), **settings)
    return Stream(data, storage=storage, mask_sampler=sample_mask, **{**chosen, **options})


def flat(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for view in ("a", "b"):
        for name, value in getattr(batch, f"photometric_{view}").items():
            found[f"{name}_{view}"] = value
    return found


def by_position(loaders: Iterable[Iterable[Batch]]) -> Delivered:
    """What several loaders deliver, keyed by position; no position may come twice."""
    found: Delivered = {}
    for loader in loaders:
        for batch in loader:
            tensors = flat(batch)
            for i, position in enumerate(batch.position.tolist()):
                assert position not in found
                row = {name: value[i].clone() for name, value in tensors.items()}
                found[position] = (batch.key[i], row)
    return found


def assert_same(got: Delivered, expected: Delivered) -> None:
    """The same samples, to the last bit."""
    assert sorted(got) == sorted(expected)
    for position, (key, row) in expected.items():
        assert got[position][0] == key
        for name, value in row.items():
            assert torch.equal(got[position][1][name], value), (position, name)
