"""The one order: which sample stands at global position n, as a pure function.

    position n --Mixture--> (source s, count q) --SourceOrder--> (epoch, shard, sample)

Everything here is arithmetic on (seed, the index, n): nothing depends on the number of nodes,
ranks or workers, on prefetching or on time, and nothing has to be replayed to start at any n.

1. **Mixture.**  `Mixture` deals positions to sources by largest remainders of exact integer
   weights.  Example, weights 2:1: sources 0 1 0 | 0 1 0 | ...  After any n positions a source of
   share w has been dealt n*w samples, off by less than one for two sources and by less than the
   depth of a binary tree over the sources for more.
2. **Chunks.**  Every shard is cut in runs of consecutive samples of a few MiB.  Each epoch visits
   the chunks of the source in a new order, sorted by a hash of (seed, source, epoch, chunk).
3. **Lanes.**  The chunks of an epoch, end to end, are one sequence of N samples.  It is cut in
   contiguous lanes, one for each place that the source has in a global batch: the i-th sample of
   the source in a batch is the next one of lane i.

       N = 10, batches of 3:   lanes  a b c d | e f g | h i j
       epoch:                  a e h  b f i  c g j  d

   What a source has in one batch varies by a sample or two; those last places share a few lanes of
   their own in turn.

Guarantees:

* every sample of a source appears exactly once in each of its epochs (2 and 3 are bijections);
* the samples of a batch come from as many places of the data, drawn at random (two neighbours
  share a chunk only where one chunk fills a whole lane), and each lane moves to another random
  chunk every few hundred of its turns;
* a lane reads its chunk front to back.  A reader of one slice of every global batch meets the
  same lanes again and again if `lanes` is the global batch or a multiple of it, so its reads are
  few, large and sequential, and no other reader needs the same bytes.  With any other `lanes` the
  order is as good and no byte is read twice; only the reads are smaller.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_MASK = (1 << 64) - 1


def hash64(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix integers or uint64 arrays into uint64 hashes (rounds of the splitmix64 finaliser).

    The project's own arithmetic, because numpy's generators may change their permutations between
    versions and a run must not change its order with them.
    """
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.uint64(part & _MASK) if isinstance(part, int) else part
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permutation(count: int, *parts: int) -> NDArray[np.int32]:
    """Seeded permutation of range(count), by sorting hashes whose last bits are the number itself.

    The keys are distinct, so every correct sort gives the same result, and the fastest may do it.
    """
    low = np.uint64((1 << max(1, (count - 1).bit_length())) - 1)
    numbers = np.arange(count, dtype=np.uint64)
    keys = np.sort((hash64(*parts, numbers) & ~low) | numbers)
    return (keys & low).astype(np.int32)


class Mixture:
    """Exact deterministic interleave of sources with positive integer weights.

    With two sources of weights u and v the first one has received round(n * u / (u + v)) samples
    after n positions.  More sources are split in two halves by weight, recursively.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or any(weight <= 0 for weight in weights):
            raise ValueError(f"mixture weights are {list(weights)}: give one positive integer each")
        self.weights = [int(weight) for weight in weights]
        if len(self.weights) > 1 and sum(self.weights) > 1 << 31:
            raise ValueError(f"mixture weights sum to {sum(self.weights)}, above 2**31")

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Map global positions to (source, how many samples that source gave before): int64."""
        source = np.zeros(positions.shape, dtype=np.int64)
        count = positions.astype(np.int64)
        self._split(0, len(self.weights), np.ones(positions.shape, dtype=bool), source, count)
        return source, count

    def taken(self, source: int, positions: Ints) -> Ints:
        """How many of the positions [0, n) belong to a source, for each n of `positions`."""
        low, high, count = 0, len(self.weights), positions
        while high - low > 1:
            middle = (low + high) // 2
            left = _share(count, sum(self.weights[low:middle]), sum(self.weights[low:high]))
            if source < middle:
                high, count = middle, left
            else:
                low, count = middle, count - left
        return count

    @property
    def slack(self) -> int:
        """Bound of |taken(n + m) - taken(n) - m * share|: two roundings per level of the tree."""
        return 2 * (len(self.weights) - 1).bit_length()

    def _split(
        self, low: int, high: int, chosen: NDArray[np.bool_], source: Ints, count: Ints
    ) -> None:
        if high - low == 1:
            source[chosen] = low
            return
        middle = (low + high) // 2
        left, total = sum(self.weights[low:middle]), sum(self.weights[low:high])
        q = count[chosen]
        before, after = _share(q, left, total), _share(q + 1, left, total)
        goes_left = after > before
        count[chosen] = np.where(goes_left, before, q - before)
        to_left, to_right = chosen.copy(), chosen.copy()
        to_left[chosen], to_right[chosen] = goes_left, ~goes_left
        self._split(low, middle, to_left, source, count)
        self._split(middle, high, to_right, source, count)


def _share(n: Ints, part: int, total: int) -> Ints:
    """round(n * part / total) without overflow: whole periods first, then the rest."""
    return n // total * part + (n % total * part + total // 2) // total


def integer_weights(samples: Sequence[int], epochs: Sequence[float]) -> list[int]:
    """Mixture weights that show source s `epochs[s]` times while all others are shown theirs.

    The exact products samples * epochs, divided by what they share and, only where their sum is
    above 2**31, rounded to that many parts.
    """
    exact = [round(n * e * 1000) for n, e in zip(samples, epochs, strict=True)]
    divisor = int(np.gcd.reduce(exact))
    if divisor <= 0:
        raise ValueError(f"sources of {list(samples)} samples cannot be shown {list(epochs)} times")
    weights = [weight // divisor for weight in exact]
    limit = 1 << 31
    if sum(weights) > limit:
        scale = sum(weights)
        weights = [max(1, weight * (limit - len(weights)) // scale) for weight in weights]
    return weights


def chunk_samples(samples: int, sample_bytes: float, chunk_bytes: int) -> int:
    """Samples per chunk: about `chunk_bytes`, and no more than 1/4096 of a small source."""
    by_size = max(1, int(chunk_bytes // max(1.0, sample_bytes)))
    return max(1, min(by_size, -(-samples // 4096)))


@dataclass(frozen=True)
class _Epoch:
    """One epoch of a source: its chunks, and where it begins and ends in the global batches."""

    chunk: NDArray[np.int32]  # (C,) chunks in the order of the epoch
    end: Ints  # (C,) samples up to and with the chunk, in that order
    first: tuple[int, int]  # batch, and place in it, of the first sample
    stop: tuple[int, int]  # of the first sample of the next epoch


class SourceOrder:
    """Order of one source within a mixture.

    Args:
        counts: samples of each shard.
        source: number of the source in the mixture.
        chunk: largest number of samples in a chunk.
        lanes: positions of a global batch, to which the lanes of the source are fitted.
        mixture: None for a source that is alone.
    """

    def __init__(
        self,
        counts: Ints,
        *,
        seed: int,
        source: int,
        chunk: int,
        lanes: int,
        mixture: Mixture | None = None,
    ) -> None:
        self.samples = int(counts.sum())
        if self.samples == 0:
            raise ValueError("a source has no sample: its index lists only empty shards")
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}: it must be at least 1")
        self.seed, self.source, self.batch, self.mixture = seed, source, lanes, mixture
        share = mixture.weights[source] / sum(mixture.weights) if mixture else 1.0
        slack = mixture.slack if mixture else 0  # at most 64: a tree over 2**31 weights
        # Places that every batch has, and lanes for those that only some batches have.
        self.regular = max(0, int(lanes * share) - slack)
        self.others = max(1, round(lanes * share) - self.regular)
        chunks = -(-counts // chunk)  # per shard
        self._first = np.concatenate([[0], np.cumsum(chunks)])  # first chunk of each shard
        self._shard_samples, self._shard_chunks = counts, chunks
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, count: Ints, position: Ints) -> tuple[Ints, Ints, Ints]:
        """Map (the source's own running count, global position) to (epoch, shard, sample)."""
        epoch = count // self.samples
        shard, sample = np.empty_like(count), np.empty_like(count)
        batch = position // self.batch
        place = count - self._taken(batch * self.batch)
        for number in np.unique(epoch):
            at = epoch == number
            rest = count[at] - int(number) * self.samples
            found = self._locate_in(self._epoch(int(number)), rest, batch[at], place[at])
            shard[at], sample[at] = found
        return epoch, shard, sample

    def nth(self, index: Ints) -> tuple[Ints, Ints]:
        """Map an index in [0, samples) to (shard, sample), in the order of the shards."""
        ends = np.cumsum(self._shard_samples)
        shard = np.searchsorted(ends, index, side="right")
        return shard, index - (ends[shard] - self._shard_samples[shard])

    def _locate_in(self, epoch: _Epoch, rest: Ints, batch: Ints, place: Ints) -> tuple[Ints, Ints]:
        at = self._in_sequence(epoch, rest, batch, place)
        index = np.searchsorted(epoch.end, at, side="right")
        start, stop, shard = self._chunk(epoch.chunk[index].astype(np.int64))
        return shard, start + at - (epoch.end[index] - (stop - start))

    def _in_sequence(self, epoch: _Epoch, rest: Ints, batch: Ints, place: Ints) -> Ints:
        """Index in the epoch's sequence of chunks of the sample at a place of a batch."""
        (first, low), (last, high) = epoch.first, epoch.stop
        lanes = self.regular

        def begin(lane: Ints) -> Ints:  # samples of all lanes before: one per batch, but the ends
            return lane * (last - first + 1) - np.minimum(lane, low) - np.maximum(lane - high, 0)

        # Places beyond the regular ones: numbered through the epoch and dealt to their own lanes.
        regular_before = lanes * (batch - first + 1) - min(low, lanes)
        other = np.maximum(rest - regular_before, 0)
        start = int(begin(np.array(lanes)))
        short, longer = divmod(self.samples - start, self.others)
        lane, turn = other % self.others, other // self.others
        return np.where(
            place < lanes,
            begin(place) + batch - first - (place < low),
            start + lane * short + np.minimum(lane, longer) + turn,
        )

    def _taken(self, positions: Ints) -> Ints:
        return self.mixture.taken(self.source, positions) if self.mixture else positions

    def _place(self, count: int) -> tuple[int, int]:
        """(batch, place in it) of the source's sample number `count`."""

        def taken(batch: int) -> int:
            return int(self._taken(np.array(batch * self.batch)))

        part, total = 1, 1
        if self.mixture:
            part, total = self.mixture.weights[self.source], sum(self.mixture.weights)
        last = (count + 64) * total // (part * self.batch) + 2
        batch = bisect_right(range(last), count, key=taken) - 1
        return batch, count - taken(batch)

    def _chunk(self, chunk: Ints) -> tuple[Ints, Ints, Ints]:
        """First sample, last sample + 1 and shard of chunks; equal chunks within a shard."""
        shard = np.searchsorted(self._first, chunk, side="right") - 1
        j, n, k = chunk - self._first[shard], self._shard_samples[shard], self._shard_chunks[shard]
        return n * j // k, n * (j + 1) // k, shard

    def _chunk_sizes(self) -> Ints:
        j = np.arange(self._first[-1]) - np.repeat(self._first[:-1], self._shard_chunks)
        n, k = (np.repeat(x, self._shard_chunks) for x in (self._shard_samples, self._shard_chunks))
        return n * (j + 1) // k - n * j // k

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = permutation(int(self._first[-1]), self.seed, self.source, number)
            ends = np.cumsum(self._chunk_sizes()[order])
            places = (self._place((number + i) * self.samples) for i in (0, 1))
            self._epochs[number] = _Epoch(order, ends, *places)
            while len(self._epochs) > 2:  # an epoch and the one that follows it overlap in a window
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]


@dataclass(frozen=True)
class Located:
    """Where global positions lie; int64 arrays of one length."""

    position: Ints
    source: Ints
    epoch: Ints
    shard: Ints
    sample: Ints


class Order:
    """The order of the whole stream: a mixture over the orders of its sources."""

    def __init__(self, sources: Sequence[SourceOrder], mixture: Mixture, seed: int) -> None:
        self.sources, self.mixture, self.seed = list(sources), mixture, seed

    def locate(self, positions: Ints) -> Located:
        """Map int64 global positions (any shape (n,), any order) to samples; O(log) each."""
        positions = np.asarray(positions, dtype=np.int64)
        source, count = self.mixture.locate(positions)
        epoch, shard, sample = (np.empty_like(positions) for _ in range(3))
        for number, order in enumerate(self.sources):
            at = source == number
            epoch[at], shard[at], sample[at] = order.locate(count[at], positions[at])
        return Located(positions, source, epoch, shard, sample)

    def substitute(self, position: int, attempt: int) -> tuple[int, int, int]:
        """The (source, shard, sample) that stands in when a sample cannot be used.

        A uniform draw from the same source, a function of (seed, position, attempt) alone, so
        that a bad sample moves no other one.
        """
        source = int(self.mixture.locate(np.array([position]))[0][0])
        draw = int(hash64(self.seed, 0x5AB5, position, attempt)[0])
        shard, sample = self.sources[source].nth(np.array([draw % self.sources[source].samples]))
        return source, int(shard[0]), int(sample[0])
