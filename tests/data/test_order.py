"""The order is a bijection per epoch, exact in its mixture, and a pure function of position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.data.order import (
    Mixture,
    Order,
    SourceOrder,
    chunk_samples,
    hash64,
    integer_weights,
)


def alone(order: SourceOrder, *span: int):
    """(epoch, shard, sample) over a range of positions of a source that is alone."""
    positions = np.arange(*span)
    return order.locate(positions, positions)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    chunk=st.integers(1, 50),
    lanes=st.integers(1, 300),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_per_epoch(counts, chunk, lanes, seed, epoch):
    order = SourceOrder(np.array(counts), seed=seed, source=0, chunk=chunk, lanes=lanes)
    total = sum(counts)
    epochs, shard, sample = alone(order, epoch * total, (epoch + 1) * total)
    assert set(epochs) == {epoch}
    everything = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    assert sorted(zip(shard.tolist(), sample.tolist(), strict=True)) == everything


def build_order(counts, weights, *, lanes: int, chunk: int = 4, seed: int = 5) -> Order:
    mixture = Mixture(weights)
    parts = [
        SourceOrder(
            np.array(each), seed=seed, source=number, chunk=chunk, lanes=lanes, mixture=mixture
        )
        for number, each in enumerate(counts)
    ]
    return Order(parts, mixture, seed=seed)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    weights=st.lists(st.integers(1, 30), min_size=5, max_size=5),
    lanes=st.integers(1, 90),
    epochs=st.integers(1, 4),
)
def test_every_sample_once_per_epoch_of_its_source_in_any_mixture(counts, weights, lanes, epochs):
    weights = weights[: len(counts)]
    order = build_order([[n // 2, n - n // 2] for n in counts], weights, lanes=lanes)
    for number, samples in enumerate(counts):
        enough = (epochs * samples + 10) * sum(weights) // weights[number]
        found = order.locate(np.arange(enough))
        mine = found.source == number
        for epoch in range(epochs):
            at = mine & (found.epoch == epoch)
            pairs = zip(found.shard[at].tolist(), found.sample[at].tolist(), strict=True)
            assert sorted(pairs) == [
                (i, j)
                for i, n in enumerate((samples // 2, samples - samples // 2))
                for j in range(n)
            ]


def test_slices_of_a_global_batch_meet_the_same_chunks_again_and_again():
    counts = [np.full(200, 500), np.full(40, 100)]
    order = build_order(counts, [100_000, 4_000], lanes=1024, chunk=64)
    steps = np.arange(20) * 1024
    positions = (steps[:, None] + 512 + np.arange(64)).reshape(-1)  # one rank, 20 global batches
    found = order.locate(positions)
    text = found.source == 0
    lanes = {(s, c // 64) for s, c in zip(found.shard[text], found.sample[text], strict=True)}
    assert text.sum() > 1200
    assert len(lanes) < 180  # 62 lanes, a third of which reach their next chunk meanwhile


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    start=st.integers(0, 10**10),
)
def test_mixture_counts_are_exact_and_consecutive(weights, start):
    positions = np.arange(start, start + 500)
    source, count = Mixture(weights).locate(positions)
    depth = max(1, int(np.ceil(np.log2(len(weights)))))
    for number, weight in enumerate(weights):
        mine = count[source == number]
        assert (np.diff(mine) == 1).all()  # a source's own count has no gap and no repetition
        ideal = positions[source == number] * (weight / sum(weights))
        assert np.abs(mine - ideal).max(initial=0) <= depth


def test_the_papers_mixture_shows_both_sources_thirty_times_in_thirty_epochs():
    samples = [427_000_000, 15_000_000]
    mixture = Mixture(integer_weights(samples, [1.0, 1.0]))
    end = 30 * sum(samples)
    source, count = mixture.locate(np.arange(end - 200, end))
    for number in (0, 1):
        assert count[source == number].max() == 30 * samples[number] - 1


def test_global_batches_of_the_papers_mixture_have_the_same_composition():
    mixture = Mixture(integer_weights([427_000_000, 15_000_000], [1, 1]))
    source, _ = mixture.locate(np.arange(40_000 * 50))
    labelled = source.reshape(50, 40_000).sum(axis=1)
    assert labelled.max() - labelled.min() <= 1


def test_epochs_scale_the_share():
    assert integer_weights([100, 50], [1, 4]) == [1, 2]
    assert integer_weights([3, 3], [0.5, 1]) == [1, 2]


def test_any_position_alone_gives_the_same_as_all_together():
    counts = np.array([13, 40, 7])

    def build():
        return build_order([counts, counts], [2, 1], lanes=6)

    together = build().locate(np.arange(700))
    rng = np.random.default_rng(0)
    for n in rng.integers(0, 700, 60):
        single = build().locate(np.array([n]))
        for field in ("source", "epoch", "shard", "sample"):
            assert getattr(single, field)[0] == getattr(together, field)[n]


def test_seeds_and_epochs_change_the_order():
    counts = np.full(50, 20)
    first = SourceOrder(counts, seed=1, source=0, chunk=4, lanes=16)
    other = SourceOrder(counts, seed=2, source=0, chunk=4, lanes=16)
    one = np.stack(alone(first, 1000)[1:])
    assert (one != np.stack(alone(other, 1000)[1:])).any(axis=0).mean() > 0.9
    assert (one != np.stack(alone(first, 1000, 2000)[1:])).any(axis=0).mean() > 0.9


def test_order_is_frozen():
    """These values are the format of a run's state: changing them breaks every resume."""
    order = SourceOrder(np.array([5, 9, 3]), seed=7, source=1, chunk=2, lanes=3)
    _, shard, sample = alone(order, 17)
    assert shard.tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 2, 2, 0, 2, 1]
    assert sample.tolist() == [3, 3, 8, 4, 4, 5, 0, 1, 6, 0, 2, 1, 1, 0, 2, 2, 7]
    assert hash64(1, 2, 3).tolist() == [15020427595393229491]


def test_neighbours_come_from_many_shards_and_the_whole_range_is_mixed():
    counts = np.full(1000, 100)  # 1000 shards
    order = SourceOrder(counts, seed=0, source=0, chunk=25, lanes=512)
    _, shard, sample = alone(order, 100_000)
    distinct = [len(set(shard[i : i + 512].tolist())) for i in range(0, 99_840, 512)]
    ideal = 1000 * (1 - (1 - 1 / 1000) ** 512)  # of 512 independent draws
    assert min(distinct) > 0.85 * ideal
    place = shard * 100 + sample  # the place in the data says nothing about the place in the epoch
    assert abs(np.corrcoef(place, np.arange(100_000))[0, 1]) < 0.05
    same_chunk = (shard[1:] == shard[:-1]).mean()
    assert same_chunk < 0.005


def test_a_lane_reads_front_to_back():
    order = SourceOrder(np.full(64, 128), seed=0, source=0, chunk=32, lanes=16)
    _, shard, sample = alone(order, 8192)
    lane_shard, lane_sample = shard.reshape(-1, 16)[:, 3], sample.reshape(-1, 16)[:, 3]
    follows = (np.diff(lane_shard) == 0) & (np.diff(lane_sample) == 1)
    assert follows.mean() > 0.95


def test_substitutes_are_fixed_and_of_the_same_source():
    counts = np.array([4, 6])
    order = build_order([counts, counts], [1, 1], lanes=2)
    drawn = [order.substitute(n, attempt) for n in range(300) for attempt in range(2)]
    assert drawn == [order.substitute(n, attempt) for n in range(300) for attempt in range(2)]
    source = order.locate(np.arange(300)).source
    assert [place[0] for place in drawn[::2]] == source.tolist()
    hits = Counter(place[1:] for place in drawn)
    assert len(hits) == 10  # uniform over all samples
    assert max(hits.values()) < 2 * 60


def test_chunks_are_large_in_large_sources_and_small_in_small_ones():
    assert chunk_samples(442_000_000, 21_000, 4 << 20) == 199
    assert chunk_samples(10_000, 4_000, 4 << 20) == 3
    assert chunk_samples(10, 10**9, 4 << 20) == 1


@pytest.mark.parametrize("weights", [[], [0], [3, -1]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive integer"):
        Mixture(weights)
