"""One reading of labels and captions, for builds, indexes and the stream alike."""

from __future__ import annotations

import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.shards import jpeg, make_source, write_tar
from helpers.streams import make_stream
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.captions import read_captions
from m3i_scale.data.decode import decode_category, decode_text
from m3i_scale.data.index import Index
from m3i_scale.data.labels import (
    category_of,
    number_names,
    read_classes,
    read_label,
    write_classes,
)
from m3i_scale.data.sequential import walk
from m3i_scale.shards.build import build_shards
from m3i_scale.shards.indexing import index_shards
from m3i_scale.shards.inspect import source_of

INTEGERS = st.integers(0, (1 << 31) - 1)
NAMES = st.text(string.ascii_letters + "äß-", min_size=1, max_size=9).filter(
    lambda name: name.casefold() not in ("nan", "none", "null", "-nan")
)
LABELS = st.one_of(INTEGERS, NAMES, st.just(None))


@given(INTEGERS, st.integers(0, 3), st.sampled_from(["", ".0", ".", ".000"]), st.booleans())
def test_every_spelling_of_an_integer_is_that_integer(number, zeros, end, plus):
    text = f"{'+' * plus}{'0' * zeros}{number}{end}"
    for value in (number, float(number), text, f" {text}\n", text.encode(), f"{number:.18e}"):
        assert read_label(value) == number
    assert decode_category(text.encode(), "cls") == number
    assert decode_category(json.dumps({"label": text}).encode(), "json:label") == number


@given(st.integers(1, 1 << 40))
def test_negative_labels_and_nothing_are_none(number):
    empty = (None, "", " \n", b"", float("nan"), "nan", "NaN", "null", "None", b"none", "<NA>")
    for value in (-number, -float(number), f"-{number}", f"-{number}.0", *empty):
        assert read_label(value) is None


@pytest.mark.parametrize("value", [1 << 31, "9" * 5000, float("inf"), [1], {"a": 1}, b"\xff\x00"])
def test_what_is_no_label_is_refused(value):
    with pytest.raises((ValueError, BadSample), match=r"label|UTF-8"):
        read_label(value)


@given(st.lists(LABELS, max_size=30))
def test_names_are_numbered_apart_from_integers_whatever_the_order(values):
    classes = number_names(read_label(value) for value in values)
    assert classes == number_names(read_label(value) for value in sorted(values, key=str))
    numbers = {value: category_of(read_label(value), classes) for value in values}
    assert all(numbers[value] == value for value in values if isinstance(value, int))
    known = [number for number in numbers.values() if number is not None]
    assert len(set(known)) == len(known)  # different labels stay different


@given(classes=st.dictionaries(NAMES, INTEGERS, min_size=1).filter(
    lambda d: len(set(d.values())) == len(d)))  # fmt: skip
def test_a_class_list_is_read_as_it_was_written(classes, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "list.json"
    write_classes(path, classes)
    assert read_classes(path) == classes


def test_a_class_list_can_be_lines_and_must_be_unambiguous(tmp_path):
    (tmp_path / "a.txt").write_text("cat\ndog\n")
    assert read_classes(tmp_path / "a.txt") == {"cat": 0, "dog": 1}
    for bad in ('["a", "a"]', '{"a": 1, "b": 1}', '{"a": "x"}', "[]", '{"a": -1}'):
        (tmp_path / "b.json").write_text(bad)
        with pytest.raises(ValueError, match="not a class list"):
            read_classes(tmp_path / "b.json")


# Composed and decomposed letters are one name: macOS writes folder names in the second form.
def test_the_form_of_letters_makes_no_class():
    assert read_label("cafe\u0301") == read_label("caf\u00e9") == "caf\u00e9"


CAPTIONS = st.lists(
    st.text(st.characters(exclude_categories=("C",)), min_size=1).filter(
        lambda t: t.strip() and not t.strip().startswith("[")
    ),
    min_size=1,
    max_size=5,
)


@given(CAPTIONS)
def test_a_list_of_captions_is_the_same_however_it_is_spelt(texts):
    plain = [" ".join(text.split()) for text in texts]
    assert read_captions(texts) == plain
    assert read_captions(json.dumps(texts)) == plain
    assert read_captions(repr(texts)) == plain
    assert read_captions([{"raw": text} for text in texts]) == plain
    assert read_captions({"url": "x", "captions": texts}) == plain
    assert decode_text(json.dumps({"c": texts}).encode(), "json:c")[0] == plain[0]
    assert decode_text(json.dumps(texts).encode(), "json")[0] == plain[0]


@pytest.mark.parametrize(
    "document",
    [
        {"caption": "a dog"},
        {"TEXT": "a dog", "URL": "http://x"},
        {"text": "a dog"},
        {"caption": None, "alt": "a dog"},
        {"caption": "", "alt_text": " a  dog"},
        {"captions": ["", "a dog", "another"]},
        {"sentences": [{"raw": "a dog", "tokens": ["a", "dog"]}]},
        {"captions": {"coca_caption": "a dog", "size": 3}},
        {"llava_caption": "a dog"},
        ["a dog", "two dogs"],
    ],
    ids=lambda d: str(d)[:40],
)
def test_captions_in_json_are_found_by_index_and_by_build(tmp_path, document):
    """The fields of img2dataset, LAION, COYO, alt texts, COCO, and others."""
    data = json.dumps(document).encode()
    members = [m for n in range(3) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.json", data))]
    tar = write_tar(tmp_path / "a.tar", members)
    index_shards([str(tar)], str(tmp_path / "i.parquet"), kind="text", progress=False)
    build_shards(str(tar), tmp_path / "built", progress=False)
    for index in ("i", "built"):
        got = [sample.text for _, sample in walk(source_of(f"{tmp_path}/{index}.parquet"))]
        assert got == ["a dog"] * 3


def test_numbers_and_nothing_are_no_captions():
    for value in (None, 3, float("nan"), "", " \0 ", [], [None, ""], {"x": "y"}, {}, b""):
        assert read_captions(value) == []
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    assert read_captions(deep) == []


LABELLED = [b"dog", b"7", b"cat", b"07", b"-1", b"7.0", b"+2", b"", b"dog"]
EXPECTED = [9, 7, 8, 7, 7, 2, 9]  # names come after the largest integer; -1 and "" are none


def test_index_build_and_stream_agree_about_labels(tmp_path):
    members = [m for n, label in enumerate(LABELLED)
               for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.cls", label))]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    output = str(tmp_path / "i.parquet")
    summary = index_shards([str(tar)], output, kind="category", progress=False)
    assert summary.problems == {"no category": 1, "empty member": 1}
    index = Index(output)
    assert index.classes == read_classes(tmp_path / "i.classes.json") == {"cat": 8, "dog": 9}
    assert index.largest_category == 9
    assert [sample.category for _, sample in walk(source_of(output))] == EXPECTED
    stream = make_stream([make_source("s", output, "category")])
    batch = next(iter(stream.loader(start=0, micro_batch=7)))
    assert sorted(batch.category.tolist()) == sorted(EXPECTED)
    built = build_shards(str(tar), tmp_path / "built", progress=False)
    assert built.left_out == {"no category": 2}
    got = [sample.category for _, sample in walk(source_of(f"{tmp_path}/built.parquet"))]
    assert sorted(got) == sorted(EXPECTED)
    assert read_classes(tmp_path / "built" / "classes.json") == index.classes


def test_another_set_is_numbered_by_the_class_list_of_the_first(tmp_path):
    members = [m for n, label in enumerate([b"dog", b"dog", b"emu"])
               for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.cls", label))]  # fmt: skip
    tar, classes = write_tar(tmp_path / "val.tar", members), {"cat": 0, "dog": 1}
    output = str(tmp_path / "i.parquet")
    summary = index_shards([str(tar)], output, kind="category", classes=classes, progress=False)
    assert summary.problems == {"bad category": 1}
    assert "'emu' is not in the class list" in str(summary)
    assert {sample.category for _, sample in walk(source_of(output))} == {1}
    built = build_shards(str(tar), tmp_path / "o", classes=classes, progress=False)
    assert built.left_out == {"class not in the class list": 1}


def test_a_stream_refuses_a_classifier_that_is_too_small(tmp_path):
    members = [m for n in range(8) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.cls", b"%d" % n))]
    tar, output = write_tar(tmp_path / "a.tar", members), str(tmp_path / "i.parquet")
    index_shards([str(tar)], output, kind="category", progress=False)
    stream = make_stream([make_source("birds", output, "category")])
    stream.require_categories(8)
    with pytest.raises(ValueError, match=r"'birds' .* category 7; set model\.categories to 8"):
        stream.require_categories(7)


def test_one_missing_caption_costs_one_sample(tmp_path):
    members = [m for n in range(9) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.txt", b"c%d" % n))]
    del members[7]
    tar = write_tar(tmp_path / "a.tar", members)
    built = build_shards(str(tar), tmp_path / "o", progress=False)
    assert (built.index.samples, built.left_out) == (8, {"no caption": 1})
    assert "a.tar" in str(built)


def test_several_captions_of_an_image_are_kept(tmp_path):
    members = [m for n in range(3) for m in ((f"{n}.jpg", jpeg(n)),
               (f"{n}.json", json.dumps({"captions": [f"a{n}", f"b{n}"]}).encode()))]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    build_shards(str(tar), tmp_path / "o", progress=False)
    output = str(tmp_path / "again.parquet")
    index_shards([f"{tmp_path}/o/*.tar"], output, kind="text", text_member="json:captions",
                 progress=False)  # fmt: skip
    assert sorted(sample.text for _, sample in walk(source_of(output))) == ["a0", "a1", "a2"]
    assert b'"b1"' in (tmp_path / "o" / "00000.tar").read_bytes()


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ('[ "a" , "b" , ]', ["a", "b"]),
        ('["a""b"]', ['["a""b"]']),
        ('["a",, "b"]', ['["a",, "b"]']),
        ('["a"] x', ['["a"] x']),
        ("[]", ["[]"]),
        ("[a]", ["[a]"]),
        ('["a" b]', ['["a" b]']),
    ],
)
def test_what_is_a_list_of_captions(text, captions):
    assert read_captions(text) == captions


@pytest.mark.parametrize("ending", [" " * 100_000 + "x", "," * 100_000 + "]", " 'b'" * 30_000])
def test_a_list_that_never_ends_takes_no_time(ending):
    begun = time.process_time()
    assert len(read_captions('["a"' + ending)) == 1
    assert time.process_time() - begun < 20  # it was minutes


def test_a_class_list_that_is_nested_without_end(tmp_path):
    (tmp_path / "classes.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_classes(tmp_path / "classes.json")
