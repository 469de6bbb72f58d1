"""The stream over data sets with random access: images with boxes, masks or labels.

Position n of the stream is sample `permutation(seed, n // N)[n % N]` of a set of N samples; all
that is random about it is drawn from a generator seeded by (seed, n). Nothing else is state, so
that a run continues at any position, on any number of ranks and workers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3i_scale.data.bad_sample import BadSample, explain
from m3i_scale.data.make import TooManyBadSamples
from m3i_scale.data.order import hash64, permutation

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
        """Facts for `--dry-run`: kind, samples, shards, bytes."""
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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: it must lie in [0, {world_size})")
        first = start + rank * micro_batch
        blocks = _Blocks(first, micro_batch, world_size * micro_batch, end)
        return MapLoader(self, blocks, workers, pin_memory)


class _Blocks:
    """Positions of each micro-batch."""

    def __init__(self, first: int, size: int, stride: int, end: int | None) -> None:
        self._first, self._size, self._stride, self._end = first, size, stride, end

    def __iter__(self) -> Iterator[list[int]]:
        first = self._first
        while self._end is None or first < self._end:
            stop = first + self._size if self._end is None else min(first + self._size, self._end)
            yield list(range(first, stop))
            first += self._stride


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
    """What runs in a worker: a list of positions gives a micro-batch."""

    def __init__(self, stream: MapStream) -> None:
        self.dataset, self.seed = stream.dataset, stream.seed

    def __getitem__(self, positions: list[int]) -> _Loaded:
        faults: list[tuple[int, str, str]] = []
        samples = [self._at(position, faults) for position in positions]
        return _Loaded(Placed(self.dataset.collate(samples), torch.tensor(positions)), faults)

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
        raise TooManyBadSamples(
            f"position {position}: {_ATTEMPTS} samples in a row could not be used, the last one "
            f"because of {faults[-1][2]}; see that the data is where it was"
        )


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int32]:
    return permutation(count, seed, epoch)


class MapLoader:
    """Iterable of the micro-batches of one rank.

    Attributes:
        faults: Counter of causes of bad samples, so far, on this rank.
    """

    def __init__(
        self, stream: MapStream, blocks: Iterable[list[int]], workers: int, pin_memory: bool
    ) -> None:
        self.stream, self._blocks = stream, blocks
        self._workers, self._pin_memory = workers, pin_memory
        self.faults: Counter[str] = Counter()
        self._seen = self._replaced = 0

    def __iter__(self) -> Iterator[Placed]:
        loader: DataLoader[_Loaded] = DataLoader(
            _Samples(self.stream),
            sampler=cast(Any, self._blocks),
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=_single_thread if self._workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its seed of workers is not drawn from the default one
        )
        for loaded in loader:
            self._note(loaded)
            yield loaded.placed.pin_memory() if self._pin_memory else loaded.placed

    def _note(self, loaded: _Loaded) -> None:
        for position, cause, text in loaded.faults:
            self.faults[cause] += 1
            log.warning("position %d: replaced a sample (%s)", position, text)
        self._replaced += len(loaded.faults)
        self._seen += len(loaded.placed)
        rate, window = self.stream.max_bad_rate, self.stream.bad_window
        if self._replaced > rate * window:
            raise TooManyBadSamples(
                f"{self._replaced} of the last {window} samples of this rank could not be used, "
                f"more than max_bad_rate {rate} allows: {'; '.join(explain(self.faults))}. "
                f"The last one: {loaded.faults[-1][2]}. Raise data.max_bad_rate where such a share "
                "may be lost."
            )
        if self._seen >= window:
            self._seen = self._replaced = 0


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism


def _as_it_is(loaded: Any) -> Any:
    return loaded


class Share(NamedTuple):
    """Samples of one rank, to be evaluated."""

    batch: Any
    indices: list[int]  # in the data set; -1: there to fill the batch, to be left out


def shares(
    dataset: MapDataset, batch: int, *, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Share]:
    """All samples once over all ranks, in as many batches on every rank.

    Raises:
        ValueError: a sample cannot be read: figures of the others would be of another set.
    """
    rounds = -(-len(dataset) // (batch * world_size))
    blocks = []
    for number in range(rounds):
        first = (number * world_size + rank) * batch
        blocks.append([i if i < len(dataset) else -1 for i in range(first, first + batch)])
    loader: DataLoader[Share] = DataLoader(
        _Shares(dataset),
        sampler=cast(Any, blocks),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_single_thread if workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    yield from loader


class _Shares(Dataset[Share]):
    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Share:
        try:
            samples = [self.dataset.load(max(index, 0)) for index in indices]
        except BadSample as bad:
            raise ValueError(
                f"a sample of the test set cannot be used ({bad}): mend it, or leave it out of the "
                "set"
            ) from None
        return Share(self.dataset.collate(samples), indices)
