"""Bad data neither stops nor shifts the stream: every other position stays as it was."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.shards import jpeg, make_source, text_members, text_source, write_tar
from helpers.streams import by_position, flat, make_stream
from m3i_scale.config import Source
from m3i_scale.data import TooManyBadSamples
from m3i_scale.data.index import Index
from m3i_scale.shards.indexing import index_shards


def epoch(source: Source, **options):
    stream = make_stream([source], max_bad_rate=1.0, **options)
    loader = stream.loader(start=0, micro_batch=10, end=stream.samples)
    return by_position([loader]), loader


def unchanged(got, expected) -> list[int]:
    """Positions whose sample and every tensor are as they were."""
    assert sorted(got) == sorted(expected)
    return [
        n
        for n, (key, row) in expected.items()
        if got[n][0] == key
        and all(torch.equal(got[n][1][name], value) for name, value in row.items())
    ]


@pytest.fixture
def source(tmp_path) -> Source:
    return text_source(tmp_path, [20, 20, 20])


def shard(source: Source, number: int) -> Path:
    return Path(Index(source.index).url(number))


def test_a_shard_deleted_during_the_run(source, caplog):
    expected, _ = epoch(source)
    stream = make_stream([source], max_bad_rate=1.0)
    loader = stream.loader(start=0, micro_batch=2, end=60)
    got, steps = {}, iter(loader)
    for _ in range(5):
        got |= by_position([[next(steps)]])
    shard(source, 1).unlink()
    with caplog.at_level(logging.WARNING, logger="m3i_scale.data"):
        got |= by_position([steps])
    lost = {n for n, (key, _) in expected.items() if "00001.tar" in key}
    same = set(unchanged(got, expected))
    assert set(expected) - lost <= same
    assert loader.faults["missing shard"] >= len(lost - same) > 0
    assert "pairs/pairs/00001.tar" in caplog.text
    for n in lost - same:
        assert "00001.tar" not in got[n][0]


def test_a_truncated_shard_loses_its_end_alone(source):
    expected, _ = epoch(source)
    path = shard(source, 2)
    half = int(Index(source.index).members(2, 10, 11)[0, 0]) + 5
    path.write_bytes(path.read_bytes()[:half])
    got, loader = epoch(source)
    assert len(unchanged(got, expected)) == 50
    assert loader.faults["truncated shard"] >= 10


def test_bit_flips_change_nothing_but_their_own_sample(source):
    expected, _ = epoch(source)
    rng = np.random.default_rng(1)
    members = Index(source.index).members(0, 0, 20)
    data = bytearray(shard(source, 0).read_bytes())
    for number in range(0, 20, 2):  # in pixels, headers of images, captions and headers of tar
        at = [
            int(members[number, 0] + rng.integers(members[number, 1])),
            int(members[number, 0] + 2),
            int(members[number, 2]),
            int(members[number, 0] - 512 + 130),
        ][number // 2 % 4]
        data[at] ^= 1 << int(rng.integers(8))
    shard(source, 0).write_bytes(bytes(data))
    got, _ = epoch(source)
    assert len(unchanged(got, expected)) >= 50


def test_a_shard_that_was_rewritten_after_indexing_is_noticed(source):
    write_tar(shard(source, 0), text_members(500, 20))
    _, loader = epoch(source)
    assert loader.faults["shard does not match its index"] + loader.faults["truncated shard"] >= 19


def test_replacements_are_fixed_whatever_the_machine(source):
    shard(source, 1).unlink()
    stream = make_stream([source], max_bad_rate=1.0)
    one = by_position([stream.loader(start=0, micro_batch=60, end=60)])
    many = by_position(
        stream.loader(start=0, micro_batch=2, rank=r, world_size=3, workers=2, end=60)
        for r in range(3)
    )
    assert unchanged(many, one) == list(range(60))


BAD = {
    "undecodable image": ("jpg", b"not an image"),
    "too many pixels": ("jpg", jpeg(size=(300, 300))),
    "empty caption": ("txt", b"  \n"),
    "bad UTF-8": ("txt", b"\xff\xfe\xfa"),
    "absurd caption": ("txt", b"x" * (2 << 20)),
}


@pytest.mark.parametrize("cause", BAD)
def test_bad_samples_are_replaced_counted_and_logged(tmp_path, cause, caplog):
    members = text_members(0, 40)
    kind, data = BAD[cause]
    members = [(name, data) if name == f"{17:09d}.{kind}" else (name, old) for name, old in members]
    path = write_tar(tmp_path / "a.tar", members)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind="text", progress=False)
    source = make_source("pairs", str(tmp_path / "i.parquet"), "text")
    with caplog.at_level(logging.WARNING, logger="m3i_scale.data"):
        got, loader = epoch(source, max_pixels=10_000)
    assert dict(loader.faults) == {cause: 1}
    assert "sample 000000017 of pairs/a.tar" in caplog.text
    keys = [key for key, _ in got.values()]
    assert len(keys) == 40
    assert len(set(keys)) == 39


def test_half_characters_in_json_are_dropped_and_counted(tmp_path):
    members = [(f"{n}.{kind}", data) for n in range(10) for kind, data in (
        ("jpg", jpeg(n)),
        ("json", b'{"caption": "c%d%s"}' % (n, b" \\ud83d" * (n == 3))),
    )]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind="text", progress=False)
    got, loader = epoch(make_source("pairs", str(tmp_path / "i.parquet"), "text"))
    assert dict(loader.faults) == {"bad UTF-8": 1}
    assert len({key for key, _ in got.values()}) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_rate_training_stops_with_one_message(source, workers):
    shard(source, 0).unlink()
    stream = make_stream([source], max_bad_rate=0.1, bad_window=50)
    with pytest.raises(TooManyBadSamples, match=r"max_bad_rate 0\.1 .*missing shard"):
        list(stream.loader(start=0, micro_batch=6, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_at_all_stops_too(source, workers):
    for number in range(3):
        shard(source, number).unlink()
    stream = make_stream([source], max_bad_rate=1.0)
    with pytest.raises(TooManyBadSamples, match=r"^position \d+: .* all unusable") as caught:
        next(iter(stream.loader(start=0, micro_batch=6, workers=workers)))
    assert caught.value.for_users
    assert "\n" not in str(caught.value)


def test_below_the_rate_it_goes_on(source):
    shard(source, 0).unlink()
    stream = make_stream([source], max_bad_rate=0.6, bad_window=60)
    loader = stream.loader(start=0, micro_batch=6, end=180)
    assert sum(len(batch) for batch in loader) == 180
    assert loader.faults["missing shard"] >= 60


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/m3i-was-here", "w"))


def test_pickles_in_shards_stay_bytes(tmp_path):
    payload = pickle.dumps(Bomb())
    members = text_members(0, 8)
    members += [("x.jpg", payload), ("x.pyd", payload), ("x.txt", payload),
                ("y.pickle", payload), ("y.jpg", jpeg(1)), ("y.txt", b"fine")]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind="text", progress=False)
    got, loader = epoch(make_source("pairs", str(tmp_path / "i.parquet"), "text"))
    assert len(got) == 10
    assert sum(loader.faults.values()) >= 1
    assert not Path("/tmp/m3i-was-here").exists()


# What the index finds in foreign archives.


def index_of(tmp_path, members, kind="text", **options) -> Index:
    path = write_tar(tmp_path / "a.tar", members, **options)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind=kind, progress=False)
    return Index(str(tmp_path / "i.parquet"))


def test_missing_members_are_listed_with_their_causes(tmp_path):
    members = text_members(0, 5)
    del members[1:3]  # 0 has neither json nor txt
    members += [("a.txt", b"no image"), ("b.jpg", b""), ("b.txt", b"empty image"),
                ("c.jpg", jpeg()), ("c.jpg", jpeg()), ("c.txt", b"twice"),
                ("d.png", jpeg()), ("d.txt", b"a JPEG named png is fine"),
                ("__meta__.json", b"{}"), ("noextension", b"?")]  # fmt: skip
    index = index_of(tmp_path, members)
    assert index.samples == 5
    assert {(key, cause) for _, key, cause in index.problems()} == {
        ("000000000", "no txt"),
        ("a", "no image"),
        ("b", "empty member"),
        ("c", "repeated member"),
    }


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_tar_format(tmp_path, format):
    folder = "ordner mit ümlaut/" + "d" * 80 + "/"
    name = "x" * (90 if format == tarfile.USTAR_FORMAT else 190)
    members = [(f"{folder}{name}{n}.{kind}", data) for n in range(3)
               for kind, data in (("jpg", jpeg(n)), ("txt", b"c"))]  # fmt: skip
    index = index_of(tmp_path, members, format=format)
    assert index.samples == 3
    source = make_source("pairs", index.path, "text")
    assert len(epoch(source)[0]) == 3


def test_a_damaged_header_costs_its_own_sample(tmp_path):
    buffer = io.BytesIO(write_tar(tmp_path / "a.tar", text_members(0, 9)).read_bytes())
    with tarfile.open(fileobj=buffer) as tar:
        offset = tar.getmember("000000004.jpg").offset
    data = bytearray(buffer.getvalue())
    data[offset + 3] ^= 0x40
    (tmp_path / "a.tar").write_bytes(bytes(data))
    index_shards(
        [str(tmp_path / "a.tar")], str(tmp_path / "i.parquet"), kind="text", progress=False
    )
    index = Index(str(tmp_path / "i.parquet"))
    assert index.samples == 8
    causes = {cause for _, _, cause in index.problems()}
    assert causes == {"corrupt tar header", "no image"}


def test_truncated_and_hopeless_archives_become_rows_of_problems(tmp_path):
    good = write_tar(tmp_path / "0.tar", text_members(0, 4))
    cut = write_tar(tmp_path / "1.tar", text_members(4, 4))
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes()) // 2 - 5000])
    (tmp_path / "2.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "3.tar").write_bytes(b"")
    names, output = [str(tmp_path / "*.tar"), str(tmp_path / "4.tar")], str(tmp_path / "i.parquet")
    with pytest.raises(ValueError, match=r"1 of 5 shards .*\n.*4\.tar: missing shard"):
        index_shards(names, output, kind="text", progress=False)
    assert not Path(output).exists()
    summary = index_shards(names, output, kind="text", skip_unreached=True, progress=False)
    assert "4.tar" in str(summary)
    index = Index(str(tmp_path / "i.parquet"))
    assert len(index.shards) == 5
    assert index.counts[0] == 4
    assert 0 < index.counts[1] < 4
    assert index.counts[2:].tolist() == [0, 0, 0]
    assert {"missing shard", "no member", "corrupt tar header"} <= set(summary.problems)
    assert good.exists()
    assert len(epoch(make_source("pairs", index.path, "text"))[0]) == index.samples


def test_categories_and_captions_in_json(tmp_path):
    members = []
    for n in range(4):
        members += [
            (f"{n}.jpg", jpeg(n)),
            (f"{n}.json", b'{"caption": "c%d", "label": %d}' % (n, n)),
        ]
    index = index_of(tmp_path, members, kind="both")
    assert (index.text_member[0], index.category_member[0]) == ("json:caption", "json:label")
    stream = make_stream([make_source("both", index.path, "both")])
    batch = next(iter(stream.loader(start=0, micro_batch=4)))
    assert sorted(batch.category.tolist()) == [0, 1, 2, 3]
    assert flat(batch)["has_text"].all()


def test_compressed_archives_and_empty_lists_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unpack it"):
        index_shards(["x.tar.gz"], str(tmp_path / "i.parquet"), kind="text")
    with pytest.raises(ValueError, match="no shard matches"):
        index_shards([str(tmp_path / "*.tar")], str(tmp_path / "i.parquet"), kind="text")
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match="no usable sample"):
        index_shards([str(path)], str(tmp_path / "i.parquet"), kind="text", progress=False)


def test_an_interrupted_index_goes_on(tmp_path, monkeypatch):
    from m3i_scale.shards import indexing

    paths = [str(write_tar(tmp_path / f"{n}.tar", text_members(n * 3, 3))) for n in range(4)]
    scanned = []
    original = indexing.index_shard

    def interrupted(name, *args):
        scanned.append(name)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(indexing, "index_shard", interrupted)
    output = str(tmp_path / "i.parquet")
    with pytest.raises(KeyboardInterrupt):
        index_shards(paths, output, kind="text", progress=False)
    index_shards(paths, output, kind="text", progress=False)
    assert scanned == [*paths[:3], *paths[2:]]
    assert Index(output).samples == 12
    assert not Path(f"{output}.parts").exists()
