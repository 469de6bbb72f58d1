"""Several captions of an image: which is shown, and what happens where one is missing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from helpers.shards import jpeg, write_tar
from helpers.small import small_tree
from helpers.streams import assert_same, by_position, make_stream
from m3i_scale.config import Config, Source
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.caption_choice import choose
from m3i_scale.data.index import Index
from m3i_scale.data.make import Sample
from m3i_scale.data.sequential import source_of, walk
from m3i_scale.shards.indexing import index_shards
from m3i_scale.shards.inspect import check, show
from m3i_scale.tasks.pretraining import Pretraining

PLACES = ("txt", "alt.txt", "json:captions")
WEIGHTS = {"txt": 1.0, "alt.txt": 2.0, "json:captions": 1.0}
COUNT = 12


def members(number: int, left_out: set[str]) -> list[tuple[str, bytes]]:
    """A sample with a title, an alternative and two captions in a list."""
    found = {
        "jpg": jpeg(number),
        "txt": f"title {number}".encode(),
        "alt.txt": f"alt {number}".encode(),
        "json": json.dumps({"captions": [f"one {number}", f"two {number}"], "key": "k"}).encode(),
    }
    return [(f"{number:04d}.{kind}", data) for kind, data in found.items() if kind not in left_out]


def shard(folder: Path, changes: dict[int, Any] | None = None) -> str:
    """A tar of samples; `changes` leaves members out (a set) or replaces them (a dictionary)."""
    every = []
    for number in range(COUNT):
        change = (changes or {}).get(number, set())
        replaced = change if isinstance(change, dict) else {}
        for name, data in members(number, set() if replaced else change):
            every.append((name, replaced.get(name.split(".", 1)[1], data)))
    return str(write_tar(folder / "a.tar", every))


def source(folder: Path, changes: dict[int, Any] | None = None, **settings: Any) -> Source:
    index = str(folder / "a.parquet")
    index_shards([shard(folder, changes)], index, kind="text", text_member=PLACES, progress=False)
    return Source(name="a", index=index, kind="text", **({"captions": WEIGHTS} | settings))


def texts(stream: Any, end: int, **options: Any) -> dict[int, str]:
    """The caption at each position, as the bytes that the test's tokenizer keeps."""
    delivered = by_position([stream.loader(start=0, micro_batch=4, end=end, **options)])
    return {
        position: bytes(row["tokens"][row["token_mask"]].tolist()).decode()
        for position, (_, row) in delivered.items()
    }


def test_captions_are_drawn_by_weight_and_of_a_list_evenly(tmp_path: Path):
    found = texts(make_stream([source(tmp_path)]), 4000)
    shown = Counter(text.split()[0] for text in found.values())
    shares = {word: count / 4000 for word, count in shown.items()}
    expected = {"title": 1 / 4, "alt": 1 / 2, "one": 1 / 8, "two": 1 / 8}
    assert shares == pytest.approx(expected, abs=0.03)


def test_everything_else_is_as_with_one_caption(tmp_path: Path):
    several, first = (
        make_stream([source(tmp_path, captions=captions)]) for captions in (WEIGHTS, None)
    )
    one, two = (by_position([s.loader(start=0, micro_batch=4, end=40)]) for s in (several, first))
    for delivered in (one, two):
        for _, row in delivered.values():
            del row["tokens"], row["token_mask"]
    assert_same(one, two)
    assert {text.split()[0] for text in texts(first, 40).values()} == {"title"}


def test_any_ranks_workers_and_start_show_the_same_captions(tmp_path: Path):
    stream = make_stream([source(tmp_path, {3: {"txt"}, 5: {"json": b"{"}})])
    whole = by_position([stream.loader(start=0, micro_batch=6, end=96)])
    ranks = [stream.loader(start=24, micro_batch=2, rank=rank, world_size=3, workers=rank, end=96)
             for rank in range(3)]  # fmt: skip
    assert_same(by_position(ranks), {at: row for at, row in whole.items() if at >= 24})
    other = texts(make_stream([source(tmp_path)], seed=4), 96)
    assert other != texts(stream, 96)


def test_where_a_caption_is_missing_or_damaged_the_others_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    changes = {
        2: {"alt.txt", "json"}, 3: {"txt"}, 5: {"json": b'{"captions": []}'},
        7: {"alt.txt": b"\xff\xfe\xfd"}, 8: {"txt": b"  "},
    }  # fmt: skip
    own = source(tmp_path, changes)
    stream = make_stream([own], max_bad_rate=0.0)
    loader = stream.loader(start=0, micro_batch=4, end=2400)
    with caplog.at_level(logging.WARNING):
        shown: dict[int, Counter[str]] = {}
        for batch in loader:
            for row, mask in zip(batch.tokens, batch.token_mask, strict=True):
                word, number = bytes(row[mask].tolist()).decode().split()
                shown.setdefault(int(number), Counter())[word] += 1
    assert len(shown) == COUNT
    assert set(shown[2]) == {"title"}
    assert set(shown[3]) == {"alt", "one", "two"}
    assert set(shown[5]) == {"title", "alt"}
    assert set(shown[7]) == {"title", "one", "two"}
    assert set(shown[8]) == {"alt", "one", "two"}
    # Of what is left the weights still count: 2 to 1.
    assert shown[3]["alt"] / shown[3].total() == pytest.approx(2 / 3, abs=0.12)
    assert loader.faults["no caption in alt.txt"] == shown[2].total()
    assert loader.faults["bad UTF-8"] > 10
    assert caplog.text.count("no caption in alt.txt") == 1
    damaged = "used other captions of sample 0007 of a/a.tar (bad UTF-8: alt.txt: truncated data"
    assert damaged in caplog.text


def test_the_index_counts_what_is_missing_and_the_check_what_is_damaged(tmp_path: Path):
    changes = {
        0: {"txt", "alt.txt", "json"}, 2: {"alt.txt", "json"}, 3: {"txt"},
        5: {"json": b'{"captions": []}'}, 7: {"alt.txt": b"\xff\xfe\xfd"},
    }  # fmt: skip
    index = str(tmp_path / "a.parquet")
    summary = index_shards(
        [shard(tmp_path, changes)], index, kind="text", text_member=PLACES, progress=False
    )
    assert summary.samples == COUNT - 1
    assert summary.problems == {"no caption": 1}
    assert summary.gaps == {"txt": 1, "alt.txt": 1, "json:captions": 2}
    assert "2 samples have no caption in json:captions: their others are used" in str(summary)
    assert Index(index).notes["gaps"] == summary.gaps
    report = check(index, progress=False)
    assert report.bad == [("no caption", "a.tar", "0000")]
    assert report.causes["no caption in alt.txt (other captions are used)"] == 1
    assert report.causes["bad UTF-8 (other captions are used)"] == 1
    found = [sample for _, sample in walk(source_of(index))]
    assert isinstance(found[0], Sample)
    assert (found[0].text, found[0].others) == ("title 1", ("alt 1", "one 1", "two 1"))
    show(index, str(tmp_path / "sheet.png"), count=8)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_shard_whose_second_caption_was_exchanged_is_noticed(tmp_path: Path):
    own = source(tmp_path)
    shard(tmp_path, {4: {"alt.txt": b"alt four, longer than it was"}})
    bad = [sample for _, sample in walk(own) if isinstance(sample, BadSample)]
    assert bad
    assert all(one.cause == "shard does not match its index" for one in bad)


def test_other_fields_of_an_indexed_document_need_no_other_index(tmp_path: Path):
    own = source(tmp_path, captions={"json:captions": 1, "json:key": 3})
    words = {text.split()[0] for text in texts(make_stream([own]), 96).values()}
    assert words == {"one", "two", "k"}


def test_a_place_that_the_index_has_not_is_refused(tmp_path: Path):
    index = str(tmp_path / "a.parquet")
    index_shards([shard(tmp_path)], index, kind="text", progress=False)
    own = Source(name="a", index=index, kind="text", captions={"txt": 1, "alt.txt": 1})
    with pytest.raises(ValueError, match=r"index it again with --caption txt --caption alt\.txt"):
        make_stream([own])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions": {}}, "names no place"),
        ({"captions": {"txt": 0}}, "greater than 0"),
        ({"captions": {"json:": 1}}, "'json:' is no place of captions"),
        ({"captions": {"txt:caption": 1}}, "'txt:caption' is no place of captions"),
        ({"captions": {"txt": 1}, "kind": "category"}, "belong to kinds text and both"),
    ],
)
def test_impossible_captions_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Source(**({"name": "a", "index": "x", "kind": "text"} | settings))


def test_a_member_twice_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="name each member once"):
        index_shards(["x.tar"], str(tmp_path / "a.parquet"), kind="text",
                     text_member=["txt", "txt"], progress=False)  # fmt: skip


def test_nothing_left_says_what_was_wrong():
    with pytest.raises(BadSample, match=r"bad UTF-8: alt\.txt") as caught:
        choose({"txt": None, "alt.txt": b"\xff\xfe\xfd"}, WEIGHTS, (0.0, 0.0))
    assert caught.value.cause == "bad UTF-8"
    with pytest.raises(BadSample, match=r"there is none in txt, alt\.txt, json:captions"):
        choose({"txt": b" "}, WEIGHTS)


def test_a_run_states_its_weights_and_an_older_one_without_them_goes_on():
    plain = {"name": "a", "index": "x", "kind": "both"}
    stated = [
        Pretraining(
            Config.model_validate(small_tree(overrides={"data.sources": [plain | more]}))
        ).statement([])
        for more in ({}, {"captions": {"txt": 1, "alt.txt": 2}})
    ]
    key = "data.sources.0.captions"
    assert not [name for name in stated[0] if name.startswith(key)]
    assert {name: value for name, value in stated[1].items() if name.startswith(key)} == {
        f"{key}.txt": 1,
        f"{key}.alt.txt": 2,
    }
