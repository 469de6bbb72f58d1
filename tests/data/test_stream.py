"""Exactness: what the stream delivers depends on the position alone."""

from __future__ import annotations

import multiprocessing
import os
import select
import sys
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from helpers.shards import make_source, text_source
from helpers.streams import assert_same, by_position, make_stream
from m3i_scale.config import Augmentation, Photometric


@pytest.fixture(scope="module")
def uninterrupted(sources):
    """One epoch of the whole mixture, one process."""
    stream = make_stream(sources)
    return by_position([stream.loader(start=0, micro_batch=81, end=81)])


def test_an_epoch_is_the_index(sources, uninterrupted):
    keys = sorted(key for key, _ in uninterrupted.values())
    assert len(set(keys)) == 81
    assert sum(key.startswith("pairs/") for key in keys) == 60


@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(3, 0, 4), (2, 2, 6), (1, 3, 2)])
def test_ranks_and_workers_do_not_change_the_order(
    sources, uninterrupted, ranks, workers, micro_batch
):
    stream = make_stream(sources)
    loaders = [
        stream.loader(
            start=0, micro_batch=micro_batch, rank=r, world_size=ranks, workers=workers, end=81
        )
        for r in range(ranks)
    ]
    assert_same(by_position(loaders), uninterrupted)


def test_stops_and_changes_of_the_machine_do_not_change_the_order(sources, uninterrupted):
    rng, start, got = np.random.default_rng(0), 0, {}
    while start < 81:
        ranks, micro_batch = int(rng.integers(1, 4)), 2 * int(rng.integers(2, 6))
        workers, steps = int(rng.choice([0, 0, 2])), int(rng.integers(1, 3))
        stream = make_stream(sources)  # a new process would build it again
        loaders = [
            stream.loader(start=start, micro_batch=micro_batch, rank=r, world_size=ranks,
                          workers=workers, end=81)
            for r in range(ranks)
        ]  # fmt: skip
        # Left in the middle, with parts made ahead that nobody will take.
        got |= by_position(islice(loader, steps) for loader in loaders)
        start = min(81, start + ranks * micro_batch * steps)
    assert_same(got, uninterrupted)


def test_slices_are_as_promised(sources):
    stream = make_stream(sources)
    loader = stream.loader(start=10, micro_batch=4, rank=1, world_size=3, workers=2)
    steps = iter(loader)
    assert next(steps).position.tolist() == [14, 15, 16, 17]
    assert next(steps).position.tolist() == [26, 27, 28, 29]


def test_prefetching_and_memory_limits_do_not_change_anything(sources, uninterrupted):
    stream = make_stream(sources, window_bytes=1, read_threads=1)
    assert_same(by_position([stream.loader(start=0, micro_batch=9, end=81)]), uninterrupted)


def test_targets_follow_the_kind_of_the_source(uninterrupted):
    for key, row in uninterrupted.values():
        text = bytes(row["tokens"][row["token_mask"]].tolist()).decode()
        if key.startswith("pairs/"):
            assert row["has_text"]
            assert row["category"] == -1
            assert text == f"caption {int(key.split('/')[-1])}"
        else:
            assert not row["has_text"]
            assert text == ""
            assert row["category"] == int(key.split("/")[-1][1:]) % 7


def test_types_and_shapes(sources):
    batch = next(iter(make_stream(sources).loader(start=0, micro_batch=6)))
    for view in (batch.view_a, batch.view_b):
        assert view.shape == (6, 16, 16, 3)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
    assert batch.mask.shape == (6, 2, 2)
    assert batch.mask.dtype == torch.bool
    assert batch.box_a.dtype == torch.float32
    assert len(batch) == len(batch.key) == 6
    moved = batch.to("cpu")
    assert torch.equal(moved.view_a, batch.view_a)


def test_seed_changes_order_and_augmentation_epoch_changes_augmentation(sources, uninterrupted):
    other = by_position([make_stream(sources, seed=4).loader(start=0, micro_batch=81, end=81)])
    assert [other[n][0] for n in range(81)] != [uninterrupted[n][0] for n in range(81)]
    second = by_position([make_stream(sources).loader(start=81, micro_batch=81, end=162)])
    boxes = {key: row["box_a"].tolist() for key, row in second.values()}
    same = [boxes[key] == row["box_a"].tolist() for key, row in uninterrupted.values()]
    assert sum(same) < 8


def test_views_without_flip_and_photometric_are_plain_crops(sources):
    uncoloured = Photometric(jitter_probability=0, grayscale_probability=0, blur_probability=0)
    plain = Augmentation(
        scale=(1.0, 1.0),
        ratio=(1.25, 1.25),
        flip_probability=0.0,
        view_a=uncoloured,
        view_b=uncoloured,
    )
    batch = next(iter(make_stream(sources, augmentation=plain).loader(start=0, micro_batch=8)))
    assert torch.equal(batch.view_a, batch.view_b)
    assert batch.box_a.tolist() == [[0, 0, 32, 40]] * 8
    for parameters in (batch.photometric_a, batch.photometric_b):
        assert (parameters["brightness"] == 1).all()
        assert (parameters["hue"] == 0).all()
        assert (parameters["blur_sigma"] == 0).all()
        assert (parameters["solarize"] == 256).all()
        assert not parameters["grayscale"].any()


def test_weights_and_epochs(sources, tmp_path):
    pairs, labels = sources
    weighted = [
        make_source("pairs", pairs.index, "text", 1.0),
        make_source("l", labels.index, "category", 3),
    ]
    stream = make_stream(weighted)
    share = {name: row["share"] for name, row in stream.describe().items()}
    assert share == {"pairs": 0.25, "l": 0.75}
    batch = next(iter(stream.loader(start=4000, micro_batch=400)))
    assert int(batch.has_text.sum()) == 100


def test_describe_counts(sources):
    described = make_stream(sources).describe()
    assert described["pairs"]["samples"] == 60
    assert described["pairs"]["shards"] == 4
    assert described["labels"]["bytes"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"start": -1}, "start is -1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_bad_slices_are_refused(sources, options, message):
    stream = make_stream(sources)
    with pytest.raises(ValueError, match=message):
        stream.loader(**{"start": 0, "micro_batch": 2, **options})


def test_bad_sources_are_refused(sources, tmp_path):
    pairs, labels = sources
    with pytest.raises(ValueError, match="sources"):
        make_stream([])
    with pytest.raises(ValueError, match="m3i shards index"):
        make_stream([make_source("gone", str(tmp_path / "gone.parquet"), "text")])
    with pytest.raises(ValueError, match="without a category"):
        make_stream([make_source("pairs", pairs.index, "category")])
    with pytest.raises(ValueError, match="to all of them or to none"):
        make_stream([make_source("pairs", pairs.index, "text", 1.0), labels])
    with pytest.raises(ValueError, match="kind"):
        make_source("x", pairs.index, "video")
    (tmp_path / "no.parquet").write_bytes(b"no Parquet at all, whatever it is called")
    with pytest.raises(ValueError, match="is not an index"):
        make_stream([make_source("no", str(tmp_path / "no.parquet"), "text")])


def test_index_and_shards_can_move_together(tmp_path):
    source = text_source(tmp_path / "here", [4])
    (tmp_path / "here").rename(tmp_path / "there")
    moved = make_source("pairs", source.index.replace("/here/", "/there/"), "text")
    assert len(next(iter(make_stream([moved]).loader(start=0, micro_batch=4)))) == 4


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def test_memory_stays_flat(sources):
    stream = make_stream(sources, window_bytes=1 << 20, image_size=128)
    steps = iter(stream.loader(start=0, micro_batch=16))
    for _ in range(60):
        next(steps)
    before = resident_mib()
    for _ in range(160):  # 30 epochs; what kept the pixels of every batch would grow by 250 MiB
        next(steps)
    assert resident_mib() - before < 16


def train_with_workers(sources: Any, held: int, ready: int) -> None:
    loader = make_stream(sources).loader(start=0, micro_batch=4, rank=0, world_size=1, workers=2)
    batches = iter(loader)
    next(batches)
    os.write(ready, b"x")
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_workers_end_with_their_killed_rank(sources):
    """They have copies of its connections: while they live, the other ranks wait."""
    (mine, held), (told, ready) = os.pipe(), os.pipe()
    rank = multiprocessing.get_context("fork").Process(
        target=train_with_workers, args=(sources, held, ready)
    )
    rank.start()
    os.close(held)
    os.close(ready)
    assert os.read(told, 1) == b"x"
    rank.kill()
    found, _, _ = select.select([mine], [], [], 2.0)  # at its end when nobody holds the other side
    assert found, "a worker outlives its rank"
    assert os.read(mine, 1) == b""
    rank.join()


MIXED = {"image_size": 16, "batch": 12,
         "mixed_sizes": [{"size": 16, "weight": 2.0}, {"size": 8}, {"size": 12}]}  # fmt: skip


def test_the_size_of_a_step_is_that_of_its_position(sources):
    whole = list(make_stream(sources, **MIXED).loader(start=0, micro_batch=12, end=72))
    sizes = [batch.view_a.shape[1] for batch in whole]
    assert len(set(sizes)) > 1
    assert [batch.view_b.shape for batch in whole] == [(12, size, size, 3) for size in sizes]
    for start, ranks, micro_batch, workers in ((0, 3, 4, 0), (0, 2, 2, 2), (24, 1, 6, 2)):
        stream = make_stream(sources, **MIXED)
        loaders = [
            stream.loader(start=start, micro_batch=micro_batch, rank=rank, world_size=ranks,
                          workers=workers, end=72)
            for rank in range(ranks)
        ]  # fmt: skip
        expected = by_position([iter(whole[start // 12 :])])
        assert_same(by_position(loaders), expected)


def test_sizes_have_their_shares_of_the_steps(sources):
    sizes = make_stream(sources, **MIXED).sizes
    drawn = [sizes.of_step(12 * step) for step in range(4000)]
    assert [drawn.count(size) / 4000 for size in (8, 12, 16)] == pytest.approx(
        [0.25, 0.25, 0.5], abs=0.03
    )
    other = make_stream(sources, **MIXED, seed=4).sizes
    assert drawn != [other.of_step(12 * step) for step in range(4000)]
    with pytest.raises(ValueError, match="say a step's samples"):
        make_stream(sources, **{**MIXED, "batch": None})
