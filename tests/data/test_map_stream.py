"""The stream over data sets with random access: its order, its draws, and bad samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.make import TooManyBadSamples
from m3i_scale.data.map_stream import MapStream, shares
from m3i_scale.engine.ending import exit_code


@dataclass
class Numbers:
    """A batch of indices and of what was drawn for them."""

    index: Tensor
    drawn: Tensor

    def pin_memory(self) -> Numbers:
        return self

    def to(self, device: Any) -> Numbers:
        return self


class Numbered:
    """Each sample is its index and a draw; those in `bad` cannot be used."""

    def __init__(self, count: int, bad: Sequence[int] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[int, float]:
        if index in self.bad:
            raise BadSample("unreadable file", f"{index}.png")
        return index, float(torch.rand(()))

    def collate(self, samples: Sequence[tuple[int, float]]) -> Numbers:
        index, drawn = zip(*samples, strict=True)
        return Numbers(torch.tensor(index), torch.tensor(drawn))

    def identity(self) -> Mapping[str, Any]:
        return {"samples": self.count}

    def describe(self) -> Mapping[str, int | float | str]:
        return {"kind": "numbers", "samples": self.count}


def read(stream: MapStream, **options: Any) -> dict[int, tuple[int, float]]:
    """Position -> sample."""
    found = {}
    for placed in stream.loader(**options):
        rows = zip(placed.position, placed.batch.index, placed.batch.drawn, strict=True)
        found |= {int(p): (int(i), float(d)) for p, i, d in rows}
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 5), (2, 3), (3, 1)])
def test_a_position_is_the_same_sample_however_it_is_read(ranks, micro, workers):
    stream = MapStream(Numbered(7), name="numbers", seed=3)
    whole = read(stream, start=0, micro_batch=1, end=21)
    parts: dict[int, tuple[int, float]] = {}
    for rank in range(ranks):
        parts |= read(
            stream, start=4, micro_batch=micro, rank=rank, world_size=ranks, end=19, workers=workers
        )
    assert parts == {position: whole[position] for position in range(4, 19)}


def test_each_epoch_has_each_sample_once_in_another_order():
    found = read(MapStream(Numbered(9), name="numbers", seed=0), start=0, micro_batch=3, end=27)
    epochs = [[found[p][0] for p in range(9 * n, 9 * n + 9)] for n in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({drawn for _, drawn in found.values()}) == 27


def test_loading_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    read(MapStream(Numbered(4), name="numbers", seed=0), start=0, micro_batch=2, end=8)
    assert torch.rand(()) == expected


def test_a_bad_sample_is_replaced_counted_and_moves_no_other(caplog):
    stream = MapStream(Numbered(10, bad=[4]), name="numbers", seed=1, max_bad_rate=0.5)
    good = read(MapStream(Numbered(10), name="numbers", seed=1), start=0, micro_batch=2, end=30)
    loader = stream.loader(start=0, micro_batch=2, end=30)
    seen = [int(i) for placed in loader for i in placed.batch.index]
    for position, index in enumerate(seen):
        assert index == good[position][0] or good[position][0] == 4
    assert 4 not in seen
    assert loader.faults == Counter({"unreadable file": loader.faults["unreadable file"]})
    assert loader.faults["unreadable file"] >= 3
    assert "4.png" in caplog.text


def test_too_many_bad_samples_stop_the_run():
    stream = MapStream(
        Numbered(10, bad=range(5)), name="numbers", seed=1, max_bad_rate=0.1, bad_window=20
    )
    with pytest.raises(TooManyBadSamples) as caught:
        read(stream, start=0, micro_batch=2, end=40)
    assert "max_bad_rate" in str(caught.value)
    nothing = MapStream(Numbered(3, bad=range(3)), name="numbers", seed=1, max_bad_rate=1.0)
    with pytest.raises(TooManyBadSamples, match="may be read, and run the command again"):
        read(nothing, start=0, micro_batch=2, end=4)


@pytest.mark.parametrize("size", [7, 8, 2])
def test_shares_cover_a_set_once_in_as_many_batches_on_every_rank(size):
    each = [list(shares(Numbered(size), 2, rank=rank, world_size=2)) for rank in range(2)]
    assert len({len(batches) for batches in each}) == 1
    indices = [index for batches in each for share in batches for index in share.indices]
    assert sorted(index for index in indices if index >= 0) == list(range(size))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_test_sample_is_left_out_and_named(workers, caplog):
    found = list(shares(Numbered(5, bad=[0, 3]), 2, workers=workers))
    assert [share.indices for share in found] == [[-1, 1], [2, -1], [4, -1]]
    assert [share.batch.index.tolist() for share in found] == [[1, 1], [2, 1], [4, 1]]
    assert [len(share.bad) for share in found] == [1, 1, 0]
    for name in ("0.png", "3.png"):
        assert f"left out of the test set: unreadable file: {name}" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_set_without_a_sample_that_can_be_used_is_one_sentence(workers):
    with pytest.raises(ValueError, match=r"none of the 3 samples .*0\.png") as stopped:
        list(shares(Numbered(3, bad=range(3)), 2, workers=workers))
    assert exit_code(stopped.value) == 2
