"""The stream of micro-batches: sources in, `Batch` out, at any position of the one order.

    sources --Index--> Order: position -> sample                     (index.py, order.py)
    positions of this rank and worker --ShardReader--> raw bytes          (reader.py, storage.py)
    raw bytes --SampleBuilder--> pixels, caption, category, two views        (decode.py, views.py)
    parts of all workers --Loader--> Batch                           (here)

The state of a run is one integer, the position: `loader(start=n)` continues there at once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from m3i_scale.config import Data, Source
from m3i_scale.data.bad_sample import NO_CAPTION_IN
from m3i_scale.data.batch import Batch
from m3i_scale.data.index import Index
from m3i_scale.data.make import BadSampleLimit, Part, SampleBuilder, collate, views_in
from m3i_scale.data.members import kind_of, kinds_of
from m3i_scale.data.order import Mixture, Order, SourceOrder, chunk_samples, integer_weights
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.step_sizes import StepSizes
from m3i_scale.data.storage import StorageClient, StorageError
from m3i_scale.data.workers import begin_worker

log = logging.getLogger(__name__)

MIB = 1 << 20
_PREFETCH = 2  # parts that each worker makes ahead


class Stream:
    """Exact, elastic stream over a mixture of indexed tar shards.

    Args:
        data: sources, views, limits on bad samples, storage; its `workers` and `lanes` are for the
            caller, who gives them to `loader` and here.
        seed: of the order and of all augmentation.
        lanes: interleaved lanes of the order (see order.py); part of the order's identity like the
            seed. The global batch in samples makes every read sequential for every rank
            (`Config.lanes`).
        tokenize: list of B captions -> (ids (B, L), mask (B, L)); runs in the workers.
        mask_sampler: numpy Generator, side of the views -> bool (gh, gw), one draw per sample; runs
            in the workers.
        batch: samples of an optimiser step, for `data.mixed_sizes`; a loader's `start` begins one.
        storage: what reads the shards; None for a client of `data.storage`.
        window_bytes: read-ahead of one worker.
        read_threads: concurrent reads of one worker.

    Raises:
        ValueError: on sources that do not exist, do not fit their kind or are empty.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        lanes: int,
        tokenize: Callable[[list[str]], tuple[Any, Any]],
        mask_sampler: Callable[[np.random.Generator, int], NDArray[np.bool_]],
        batch: int | None = None,
        storage: StorageClient | None = None,
        window_bytes: int = 32 * MIB,
        read_threads: int = 4,
    ) -> None:
        self.data, self.sources = data, data.sources
        self.sizes = StepSizes(data, seed, batch)
        self.storage = storage or StorageClient(data.storage)
        self.indexes = [open_index(source, self.storage) for source in self.sources]
        self.order = _build_order(data, self.indexes, seed, lanes)
        self._window_bytes, self._read_threads = window_bytes, read_threads
        self._maker_options: dict[str, Any] = {
            "seed": seed,
            "tokenize": tokenize,
            "mask_sampler": mask_sampler,
        }

    @property
    def samples(self) -> int:
        """Samples in all sources together."""
        return sum(index.samples for index in self.indexes)

    def require_categories(self, categories: int) -> None:
        """Raise ValueError where a source has a category that a classifier of that many lacks.

        0 categories stand for no classifier; indexes older than this check pass it.
        """
        for source, index in zip(self.sources, self.indexes, strict=True):
            largest = index.largest_category
            if not source.has_category or largest is None or not 0 < categories <= largest:
                continue
            raise ValueError(
                f"source {source.name!r} ({source.index}) has samples of category {largest}; set "
                f"model.categories to {largest + 1} or more (it is {categories})"
            )

    def view_bytes(self, samples: int) -> int:
        """Bytes of the views of that many samples at the largest size."""
        return self.data.augmentation.views * samples * 3 * self.sizes.largest**2

    def describe(self) -> dict[str, dict[str, int | float | str]]:
        """Per source: kind, samples, shards, bytes and share of the stream."""
        weights = self.order.mixture.weights
        return {
            source.name: {
                "kind": source.kind,
                "samples": index.samples,
                "shards": len(index.shards),
                "bytes": int(index.shard_bytes.sum()),
                "share": weight / sum(weights),
            }
            for source, index, weight in zip(self.sources, self.indexes, weights, strict=True)
        }

    def identities(self) -> list[dict[str, int | str]]:
        """What each source is, whatever its path: samples, shards, and a hash of its index.

        Equal for an index that was moved with its shards; different where a shard has come, gone
        or changed its length or its number of samples, which all move the order.
        """
        return [
            {
                "samples": index.samples,
                "shards": len(index.shards),
                "content": index.fingerprint(),
            }
            for index in self.indexes
        ]

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
    ) -> Loader:
        """Micro-batches of one rank from global position `start` on.

        Micro-step t holds the positions start + (t * world_size + rank) * micro_batch +
        [0, micro_batch).  Without `end` the stream does not end; with it, the last batch holds
        only what lies before `end`, and a rank for which nothing is left gets none.
        """
        if workers < 0:
            raise ValueError(f"workers is {workers}: it must be at least 0")
        slices = Slices(start, micro_batch, rank, world_size, end)
        return Loader(self, slices, workers, pin_memory)

    def maker(self) -> SampleBuilder:
        """A new SampleBuilder with its own ShardReader, for one worker."""
        reader = ShardReader(
            self.indexes,
            self.storage,
            window_bytes=self._window_bytes,
            threads=self._read_threads,
        )
        return SampleBuilder(self.data, self.indexes, self.order, reader, **self._maker_options)


def open_index(source: Source, storage: StorageClient) -> Index:
    """Open the index of a source; ValueError where it is missing, empty or of another kind."""
    try:
        index = Index(source.index, storage)
    except FileNotFoundError:
        raise ValueError(
            f"source {source.name!r}: there is no index {source.index!r}; "
            "make one with `m3i shards index`"
        ) from None
    except StorageError:  # an outage is no mistake of the configuration
        raise
    except OSError as error:
        raise ValueError(
            f"source {source.name!r}: the index {source.index!r} cannot be read: {error}"
        ) from None
    except ValueError as error:  # damaged
        raise ValueError(f"source {source.name!r}: {error}") from None
    if not index.checked:
        log.warning(
            "source %r: the index %s is of an older format: of shards that changed after it was "
            "made only other sizes are noticed; index them again", source.name, source.index,
        )  # fmt: skip
    for name, needs, members in (
        ("caption", source.has_text, index.text_member),
        ("category", source.has_category, index.category_member),
    ):
        if needs and not all(members[i] for i in np.flatnonzero(index.counts)):
            raise ValueError(
                f"source {source.name!r} is of kind {source.kind!r} but its index was made without "
                f"a {name} member: index it again with --kind {source.kind}"
            )
    _require_places(source, index)
    for shard in index.shards:
        storage.check(shard)
    if index.samples == 0:
        raise ValueError(f"source {source.name!r}: its index {source.index!r} holds no sample")
    return index


def _require_places(source: Source, index: Index) -> None:
    """Raise ValueError where `captions` names a member that the index has not."""
    for shard in np.flatnonzero(index.counts).tolist() if source.captions else ():
        places = index.places[shard]
        missing = [p for p in source.captions or () if kind_of(p) not in kinds_of(places)]
        if missing:
            wanted = " ".join(f"--caption {place}" for place in source.captions or ())
            raise ValueError(
                f"source {source.name!r}: its captions are to come from {', '.join(missing)}, and "
                f"the index {source.index!r} has those of {', '.join(places)} only: index it again "
                f"with {wanted}"
            )


def _build_order(data: Data, indexes: Sequence[Index], seed: int, lanes: int) -> Order:
    shares = [source.weight for source in data.sources if source.weight is not None]
    if shares:  # then every source has one
        weights = integer_weights([1_000_000] * len(shares), shares)
    else:
        samples = [index.samples for index in indexes]
        weights = integer_weights(samples, [source.epochs for source in data.sources])
    chunk_bytes = round(data.chunk_mebibytes * MIB)
    mixture = Mixture(weights)
    orders = [
        SourceOrder(
            index.counts,
            seed=seed,
            source=number,
            chunk=chunk_samples(
                index.samples, float(index.shard_bytes.sum()) / index.samples, chunk_bytes
            ),
            lanes=lanes,
            mixture=mixture,
        )
        for number, index in enumerate(indexes)
    ]
    return Order(orders, mixture, seed)


@dataclass(frozen=True)
class Slices:
    """Which positions belong to one rank, and within them to one worker.

    Raises:
        ValueError: a number is out of bounds.
    """

    start: int
    micro_batch: int
    rank: int
    world_size: int
    end: int | None

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("micro_batch", 1), ("world_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}: it must lie in [0, {self.world_size})")

    def blocks(self, worker: int, workers: int) -> Iterator[NDArray[np.int64]]:
        """The worker's share of every micro-batch: each worker has the same part of each of them,
        and therefore, like the rank, always the same lanes."""
        low, high = (self.micro_batch * k // workers for k in (worker, worker + 1))
        first = self.start + self.rank * self.micro_batch
        while self.end is None or first < self.end:
            stop = first + high if self.end is None else min(first + high, self.end)
            yield np.arange(first + low, max(stop, first + low), dtype=np.int64)
            first += self.world_size * self.micro_batch

    def sizes(self, sizes: StepSizes) -> Iterator[int]:
        """The side of the views of each micro-batch."""
        return sizes.of_micro_steps(self.start, self.world_size * self.micro_batch)


class _Feed(IterableDataset):
    """What runs in one worker process: its blocks of positions, made into parts."""

    def __init__(self, stream: Stream, slices: Slices, buffers: Tensor | None) -> None:
        self.stream, self.slices, self.buffers = stream, slices, buffers

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        buffers = None if self.buffers is None else self.buffers[worker]
        blocks, sizes = self.slices.blocks(worker, workers), self.slices.sizes(self.stream.sizes)
        return self.stream.maker().parts(blocks, sizes, buffers)


class Loader:
    """Iterable of the Batches of one rank.

    Attributes:
        faults: Counter of causes of bad samples, so far, on this rank.
        read: Counter of `reads`, `bytes` asked of the storage, `sample_bytes` used of them, and
            `cache_faults`: blocks of the cache that were damaged or could not be read or written.
    """

    def __init__(self, stream: Stream, slices: Slices, workers: int, pin_memory: bool) -> None:
        self.stream, self.slices = stream, slices
        self.workers, self.pin_memory = min(workers, slices.micro_batch), pin_memory
        self._limit = BadSampleLimit(stream.data.max_bad_rate, stream.data.bad_window)
        self.faults = self._limit.faults
        self.read: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        parts = self._from_workers() if self.workers else self._in_process()
        # Workers are polled in turn and give one part per micro-batch each.
        while group := [part for _, part in zip(range(max(1, self.workers)), parts, strict=False)]:
            for part in group:
                self._note(part)
            yield collate(group, pin_memory=self.pin_memory)

    def _in_process(self) -> Iterator[Part]:
        return iter(_Feed(self.stream, self.slices, None))

    def _from_workers(self) -> Iterator[Part]:
        # What every worker needs of the order is made once, here, and shared by fork.
        self.stream.order.locate(np.array([self.slices.start]))
        # A worker is asked for part n + _PREFETCH when part n is taken, so with one slot more than
        # that it never writes over a part that is not collated yet.
        largest = -(-self.slices.micro_batch // self.workers)
        shape = (self.workers, _PREFETCH + 1, self.stream.view_bytes(largest))
        buffers = torch.empty(shape, dtype=torch.uint8).share_memory_()
        loader = DataLoader(
            _Feed(self.stream, self.slices, buffers),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_PREFETCH,
            generator=torch.Generator(),  # the default one is the networks'
            worker_init_fn=begin_worker,
        )
        for number, part in enumerate(loader):
            flat = buffers[number % self.workers, part.slot]
            part.views = views_in(flat, self.stream.data.augmentation.views, len(part), part.size)
            yield part

    def _note(self, part: Part) -> None:
        self.read.update(part.read)
        for fault in part.faults:
            if not fault.cause.startswith(NO_CAPTION_IN):
                log.warning("position %d: %s", fault.position, fault)
            elif not self.faults[fault.cause]:  # of many samples, as a rule
                log.warning("position %d: %s; said once, and counted", fault.position, fault)
            self._limit.note(fault.cause, str(fault), replaced=fault.outcome == "replaced")
        self._limit.passed(len(part))
