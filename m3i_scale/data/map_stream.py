"""The stream over data sets with random access: images with boxes, masks or labels.

Position n of the stream is sample `permutation(seed, n // N)[n % N]` of a set of N samples; all
that is random about it is drawn from a generator seeded by (seed, n). Nothing else is state, so
that a run continues at any position, on any number of ranks and workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3i_scale.data.bad_sample import BadSample, OfOneRank, remedy
from m3i_scale.data.make import BadSampleLimit, TooManyBadSamples
from m3i_scale.data.order import hash64, permutation
from m3i_scale.data.stream import Slices
from m3i_scale.data.workers import begin_worker

log = logging.getLogger(__name__)

_ATTEMPTS = 16  # at a substitute, before the stream stops


class MapDataset(Protocol):
    """A data set with random access.

    `load` draws from torch's global generator only, which the caller seeds; `BadSample` says that
    a sample cannot be used.
    """

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any:
        """One sample."""
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch, with `to(device)` and `pin_memory()`."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What the set is, whatever its path, as JSON; another order of samples is another set."""
        ...

    def describe(self) -> Mapping[str, int | float | str]:
        """Facts for `--dry-run`: kind and samples; shards and bytes where it has shards."""
        ...


class MapStream:
    """Exact, elastic stream over a data set with random access.

    Args:
        dataset: what is read.
        name: of the source, in reports.
        seed: of the order and of all augmentation.
        max_bad_rate: share of replaced samples, among the last `bad_window` of a rank, above which
            the run stops.
        bad_window: samples over which it is measured.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        name: str,
        seed: int,
        max_bad_rate: float = 0.01,
        bad_window: int = 10_000,
    ) -> None:
        self.dataset, self.name, self.seed = dataset, name, seed
        self.max_bad_rate, self.bad_window = max_bad_rate, bad_window

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.dataset)

    def identities(self) -> list[Mapping[str, Any]]:
        """What the data set is."""
        return [self.dataset.identity()]

    def describe(self) -> dict[str, dict[str, int | float | str]]:
        """Facts about it."""
        return {self.name: {**self.dataset.describe(), "share": 1.0}}

    def loader(
        self,
        *,
        start: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        end: int | None = None,
        pin_memory: bool = False,
    ) -> MapLoader:
        """Micro-batches of one rank from global position `start` on.

        Micro-step t holds the positions start + (t * world_size + rank) * micro_batch +
        [0, micro_batch).
        """
        slices = Slices(start, micro_batch, rank, world_size, end)
        return MapLoader(self, slices, workers, pin_memory)


@dataclass(frozen=True)
class Placed:
    """A micro-batch of B samples, and where they stand in the stream: int64 (B,)."""

    batch: Any
    position: Tensor

    def __len__(self) -> int:
        return len(self.position)

    def pin_memory(self) -> Placed:
        """Copy into page-locked memory, from which a copy to the device is asynchronous."""
        return Placed(self.batch.pin_memory(), self.position.pin_memory())

    def to(self, device: torch.device | str) -> Placed:
        """Move every tensor to `device`."""
        return Placed(self.batch.to(device), self.position.to(device, non_blocking=True))


class _Loaded(NamedTuple):
    """A micro-batch, and the bad samples in whose place others stand: (position, cause, text)."""

    placed: Placed
    faults: list[tuple[int, str, str]]


class _Samples(Dataset[_Loaded]):
    """What runs in a worker: the positions (B,) of a micro-batch give it."""

    def __init__(self, stream: MapStream) -> None:
        self.dataset, self.seed = stream.dataset, stream.seed

    def __getitem__(self, positions: NDArray[np.int64]) -> _Loaded:
        faults: list[tuple[int, str, str]] = []
        samples = [self._at(position, faults) for position in positions.tolist()]
        return _Loaded(Placed(self.dataset.collate(samples), torch.from_numpy(positions)), faults)

    def _at(self, position: int, faults: list[tuple[int, str, str]]) -> Any:
        """The sample of a position; a bad one is replaced by one drawn for (position, attempt)."""
        epoch, place = divmod(position, len(self.dataset))
        index = int(_order(len(self.dataset), self.seed, epoch)[place])
        for attempt in range(_ATTEMPTS):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hash64(self.seed, position, attempt)[0]))
                try:
                    return self.dataset.load(index)
                except BadSample as bad:
                    faults.append((position, bad.cause, str(bad)))
            index = int(hash64(self.seed, position, attempt, 1)[0]) % len(self.dataset)
        _, cause, words = faults[-1]
        raise TooManyBadSamples(
            f"position {position}: {_ATTEMPTS} samples in a row could not be used, the last one "
            f"because of {words}; {remedy(cause) or 'see that the data is where it was'}"
        )


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int32]:
    return permutation(count, seed, epoch)


class MapLoader:
    """Iterable of the micro-batches of one rank.

    Attributes:
        faults: Counter of causes of bad samples, so far, on this rank.
    """

    def __init__(self, stream: MapStream, slices: Slices, workers: int, pin_memory: bool) -> None:
        self.stream, self.slices = stream, slices
        self._workers, self._pin_memory = workers, pin_memory
        self._limit = BadSampleLimit(stream.max_bad_rate, stream.bad_window)
        self.faults = self._limit.faults

    def __iter__(self) -> Iterator[Placed]:
        blocks = self.slices.blocks(0, 1)  # a worker makes whole micro-batches
        for loaded in load_ahead(_Samples(self.stream), blocks, self._workers):
            for position, cause, text in loaded.faults:
                log.warning("position %d: replaced a sample (%s)", position, text)
                self._limit.note(cause, text, replaced=True)
            self._limit.passed(len(loaded.placed))
            yield loaded.placed.pin_memory() if self._pin_memory else loaded.placed


T = TypeVar("T")


def load_ahead(made: Dataset[T], keys: Iterable[Any], workers: int) -> Iterator[T]:
    """`made[key]` of each key, in order, made ahead by workers if there are any."""
    loader: DataLoader[T] = DataLoader(
        made,
        sampler=cast(Any, keys),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=begin_worker if workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its seed of workers is not drawn from the default one
    )
    yield from loader


def _as_it_is(loaded: Any) -> Any:
    return loaded


class Share(NamedTuple):
    """Samples of one rank, to be evaluated."""

    batch: Any
    indices: list[int]  # in the data set; -1: there to fill the batch, to be left out
    bad: list[str]  # what is wrong with those that cannot be used


def shares(
    dataset: MapDataset, batch: int, *, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Share]:
    """All samples once over all ranks, in as many batches on every rank.

    Samples that cannot be used are named in the log and left out.

    Raises:
        UnusableTestSet: none can be used.
    """
    rounds = -(-len(dataset) // (batch * world_size))
    blocks = []
    for number in range(rounds):
        first = (number * world_size + rank) * batch
        blocks.append([i if i < len(dataset) else -1 for i in range(first, first + batch)])
    for share in load_ahead(_Shares(dataset), blocks, workers):
        for words in share.bad:
            log.warning("left out of the test set: %s", words)
        yield share


class UnusableTestSet(OfOneRank, ValueError):  # noqa: N818  (the name is the message)
    """No sample of a test set can be used; the run stops with one sentence."""


class _Shares(Dataset[Share]):
    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset
        self._filler: Any = None

    def __getitem__(self, indices: list[int]) -> Share:
        samples, kept, bad = [], [], list[str]()
        for index in indices:
            sample = None
            if index >= 0:
                try:
                    sample = self.dataset.load(index)
                except BadSample as found:
                    bad.append(str(found))
            kept.append(-1 if sample is None else index)
            samples.append(self._any() if sample is None else sample)
        return Share(self.dataset.collate(samples), kept, bad)

    def _any(self) -> Any:
        """The first sample that can be used."""
        first = ""
        for index in range(len(self.dataset) if self._filler is None else 0):
            try:
                self._filler = self.dataset.load(index)
                break
            except BadSample as found:
                first = first or str(found)
        if self._filler is None:
            raise UnusableTestSet(
                f"none of the {len(self.dataset)} samples of the test set can be used ({first}): "
                "mend them, or name another set"
            )
        return self._filler
