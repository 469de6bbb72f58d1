"""Reading ahead: the samples of the next window of positions, in few, large range reads.

1. look up the byte range of every sample of the window (index, offsets on demand);
2. sort the ranges of each shard and join those that (nearly) touch;
3. read the joined ranges side by side;
4. hand the samples out in the order of the stream, while the next window is being read.

A window is bounded in bytes, so memory is: two windows, whatever the shards look like.  The first
windows are short, so that the first batch after a resume does not wait for a full one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from tarfile import BLOCKSIZE as BLOCK
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.index import Index, check_of, header_identity
from m3i_scale.data.members import offsets_and_sizes
from m3i_scale.data.order import Located
from m3i_scale.data.retry import cause_of
from m3i_scale.data.storage import StorageClient

_GAP = 64 << 10  # bytes that are cheaper read through than asked for separately
_LONGEST_READ = 16 << 20
_SLICE = 256  # samples whose offsets are looked up at once
_SLICES = 1024  # such look-ups that stay in memory, 56 bytes a sample


@dataclass
class Raw:
    """The undecoded bytes of one sample, or the reason why there are none."""

    position: int
    source: int
    shard: int
    shard_name: str
    key: str = ""
    image: bytes | memoryview = b""  # a part of a whole read, not a copy of it
    text: bytes | None = None
    category: bytes | None = None
    more: tuple[bytes | None, ...] = ()  # further captions, None where there is none
    problem: BadSample | None = None


@dataclass
class ReadCount:
    """What was asked of the storage, and what of it was samples."""

    reads: int = 0
    bytes: int = 0
    sample_bytes: int = 0
    cache_faults: int = 0  # blocks that were damaged, or could not be read or written


@dataclass(frozen=True)
class Plan:
    """The reads of one window of n samples."""

    members: NDArray[np.int64]  # (n, 7 + 2 * more), as Index.members
    start: NDArray[np.int64]  # (n,) first byte of each sample: the header of its first member
    stop: NDArray[np.int64]  # (n,) end of its last member
    read: NDArray[np.int64]  # (n,) which read covers it
    reads: list[tuple[int, int, int, int]]  # (source, shard, first byte, end)


class ShardReader:
    """Fetches raw samples for one worker.

    Args:
        indexes: the index of every source, in the order's numbering.
        storage: where ranges are read.
        window_bytes: how much is read ahead.
        threads: reads under way at once.
    """

    def __init__(
        self, indexes: Sequence[Index], storage: StorageClient, *, window_bytes: int, threads: int
    ) -> None:
        self.indexes, self.storage = indexes, storage
        self.window_bytes, self.threads = window_bytes, threads
        self.count = ReadCount()
        self._slices: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()
        self._sample_bytes = np.array(
            [index.shard_bytes.sum() / max(1, index.samples) for index in indexes]
        )

    def stream(self, blocks: Iterable[Located]) -> Iterator[list[Raw]]:
        """Yield the samples of each block, in order, reading one window ahead."""
        with (
            ThreadPoolExecutor(1, thread_name_prefix="m3i-window") as planner,
            ThreadPoolExecutor(self.threads, thread_name_prefix="m3i-read") as pool,
        ):
            pending: Future[list[list[Raw]]] | None = None
            for window in self._windows(iter(blocks)):
                following = planner.submit(self._load, window, pool.map)
                if pending is not None:
                    yield from pending.result()
                pending = following
            if pending is not None:
                yield from pending.result()

    def one(self, position: int, source: int, shard: int, sample: int) -> Raw:
        """Fetch a single sample at once."""
        where = [np.array([value]) for value in (position, source, 0, shard, sample)]
        return self._load([Located(*where)], map)[0][0]

    def plan(self, located: Located) -> Plan:
        """The reads that fetch `located`."""
        members = self._members(located)
        offset, size = offsets_and_sizes(members)
        start = np.where(offset < 0, np.iinfo(np.int64).max, offset).min(axis=1) - BLOCK
        stop = (offset + size).max(axis=1)
        read, reads = _join(located, start, stop)
        return Plan(members, start, stop, read, reads)

    def _windows(self, blocks: Iterator[Located]) -> Iterator[list[Located]]:
        window: list[Located] = []
        held, limit = 0.0, 0.0  # the first window is a single block
        for block in blocks:
            window.append(block)
            held += float(self._sample_bytes[block.source].sum())
            if held >= limit:
                yield window
                limit = min(float(self.window_bytes), 2.0 * held)
                window, held = [], 0.0
        if window:
            yield window

    def _members(self, located: Located) -> NDArray[np.int64]:
        more = max(index.more for index in self.indexes)
        members = np.full((len(located.position), 7 + 2 * more), -1, dtype=np.int64)
        part = located.sample // _SLICE
        where = np.stack([located.source, located.shard, part], axis=1)
        groups, group_of = np.unique(where, axis=0, return_inverse=True)
        for number, (source, shard, piece) in enumerate(groups.tolist()):
            at = group_of.reshape(-1) == number
            rows = self._slice(source, shard, piece)
            members[at, : rows.shape[1]] = rows[located.sample[at] - piece * _SLICE]
        return members

    def _slice(self, source: int, shard: int, piece: int) -> NDArray[np.int64]:
        key = (source, shard, piece)
        if key not in self._slices:
            index = self.indexes[source]
            stop = min(int(index.counts[shard]), (piece + 1) * _SLICE)
            self._slices[key] = index.members(shard, piece * _SLICE, stop)
            while len(self._slices) > _SLICES:
                self._slices.popitem(last=False)
        self._slices.move_to_end(key)
        return self._slices[key]

    def _load(self, window: list[Located], run: Callable[..., Any]) -> list[list[Raw]]:
        located = Located(
            *(
                np.concatenate([getattr(block, name) for block in window])
                for name in ("position", "source", "epoch", "shard", "sample")
            )
        )
        plan = self.plan(located)
        results = list(run(self._read, plan.reads))
        self.count.reads += len(plan.reads)
        self.count.bytes += sum(stop - start for _, _, start, stop in plan.reads)
        self.count.sample_bytes += int((plan.stop - plan.start).sum())
        if self.storage.cache:
            self.count.cache_faults = self.storage.cache.faults.total()
        raws = self._raws(located, plan, results)
        ends = np.cumsum([len(block.position) for block in window]).tolist()
        return [raws[i:j] for i, j in pairwise([0, *ends])]

    def _read(self, read: tuple[int, int, int, int]) -> bytes | BadSample:
        source, shard, start, stop = read
        index = self.indexes[source]
        url = index.url(shard)
        try:
            return self.storage.read(url, start, stop, version=index.version(shard))
        except OSError as error:
            known = url in str(error)
            return BadSample(cause_of(error), str(error) if known else f"{url}: {error}")

    def _raws(self, located: Located, plan: Plan, results: list[bytes | BadSample]) -> list[Raw]:
        columns = (located.position, located.source, located.shard, plan.read, plan.members)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        raws = []
        for position, source, shard, read, members in rows:
            raw = Raw(position, source, shard, self.indexes[source].shards[shard])
            result = results[read]
            if isinstance(result, BadSample):
                raw.problem = result
            else:
                _cut(raw, result, plan.reads[read][2], members)
            raws.append(raw)
        return raws


def _cut(raw: Raw, data: bytes, base: int, members: list[int]) -> None:
    """Cut the members of one sample out of a read that begins at byte `base` of the shard."""
    offset, size, text, text_size, category, category_size, check, *others = members
    more = list(zip(others[::2], others[1::2], strict=True))
    raw.image = memoryview(data)[offset - base : offset - base + size]
    if text >= 0:
        raw.text = data[text - base : text - base + text_size]
    if category >= 0:
        raw.category = data[category - base : category - base + category_size]
    raw.more = tuple(data[at - base : at - base + n] if at >= 0 else None for at, n in more)
    places = ((offset, size), (text, text_size), (category, category_size), *more)
    parts = (raw.image, raw.text, raw.category, *raw.more)
    for part, (_, expected) in zip(parts, places, strict=True):
        if part is not None and len(part) < expected:
            raw.problem = BadSample("truncated shard", f"{len(part)} of {expected} bytes")
    headers = [data[at - base - BLOCK : at - base] for at, _ in places if at >= 0]
    sizes = [expected for at, expected in places if at >= 0]
    found = _header_sizes(headers, sizes, check)
    if found[0] == size:
        # Names beyond the 100 characters of a plain header come shortened; they serve the logs.
        name = headers[0][:100].rstrip(b"\0").decode("utf-8", "backslashreplace")
        raw.key = base_plus_ext(name)[0] or name
    if found != sizes and raw.problem is None:
        raw.problem = BadSample(
            "shard does not match its index",
            f"members of {sizes} bytes were indexed, now they have {found}"
            if max(found) >= 0
            else "other members stand in their place",
        )


def _header_sizes(headers: list[bytes], sizes: list[int], check: int) -> list[int]:
    """`sizes` where the tar headers before the members are those that were indexed.

    Otherwise what the headers say of the sizes, -1 where there is none or of another member: the
    shard was changed, or the index is damaged.  An index of the older format has no `check` (-1),
    so that only its sizes are compared.
    """
    found = [_size_in(header, size) for header, size in zip(headers, sizes, strict=True)]
    same = check < 0 or check_of(map(header_identity, headers)) == check
    return [-1] * len(sizes) if found == sizes and not same else found


def _size_in(header: bytes, expected: int) -> int:
    """Size in a tar header, -1 where it is none; `expected` for a form only above 8 GiB."""
    field = header[124:136]
    try:
        return expected if field[:1] == b"\x80" else int(field.partition(b"\0")[0], 8)
    except ValueError:
        return -1


def _join(
    located: Located, start: NDArray[np.int64], stop: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[tuple[int, int, int, int]]]:
    """Join ranges of one shard with gaps below _GAP into reads of up to _LONGEST_READ bytes."""
    reads: list[tuple[int, int, int, int]] = []
    covered_by = np.empty(len(start), dtype=np.int64)
    order = np.lexsort((start, located.shard, located.source))
    columns = (located.source[order], located.shard[order], start[order], stop[order])
    at = (-1, -1, 0, 0)
    for i, source, shard, first, end in zip(
        order.tolist(), *(column.tolist() for column in columns), strict=True
    ):
        near = (source, shard) == at[:2] and first - at[3] <= _GAP
        if near and end - at[2] <= _LONGEST_READ:
            at = (source, shard, at[2], max(at[3], end))
            reads[-1] = at
        else:
            at = (source, shard, first, end)
            reads.append(at)
        covered_by[i] = len(reads) - 1
    return covered_by, reads
