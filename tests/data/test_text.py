"""Captions, labels and JSON in every encoding: decoded, or refused by name, never guessed at."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.shards import jpeg, make_source, write_tar
from helpers.streams import make_stream
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.decode import decode_category, decode_text
from m3i_scale.shards.indexing import index_shards

MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXTS = ("a dog", "größe", "犬と猫", "собака", "🐕 dog")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", MARKS)
def test_texts_with_a_byte_order_mark(encoding, text):
    def encoded(value: str) -> bytes:
        return MARKS[encoding] + value.encode(encoding)

    assert decode_text(encoded(f"{text}\r\n"), "txt") == (text, False)
    for escaped in (True, False):
        document = json.dumps({"caption": text, "label": 7}, ensure_ascii=escaped)
        assert decode_text(encoded(document), "json:caption") == (text, False)
        assert decode_category(encoded(document), "json:label") == 7
    assert decode_category(encoded("12\r\n"), "cls") == 12


@pytest.mark.parametrize(
    "data",
    [
        "犬と猫".encode("shift_jis"),
        "犬と猫".encode("euc_jp"),
        "犬と猫".encode("iso2022_jp"),
        "狗和猫".encode("gb18030"),
        "собака".encode("cp1251"),
        "café".encode("latin-1"),
        "café au lait".encode("latin-1"),
        "“quoted”".encode("cp1252"),
        "a dog".encode("utf-16-le"),
        "a dog".encode("utf-16-be"),
        "a dog".encode("utf-32-le"),
        "犬と猫".encode()[:-1],
        MARKS["utf-16-le"] + "a dog".encode("utf-16-le")[:-1],
        MARKS["utf-8"] + b"caf\xe9",
    ],
)
def test_other_encodings_are_refused_and_never_cut_to_what_passes(data):
    document = b'{"caption": "' + data + b'"}'
    for member, body in (("txt", data), ("json:caption", document)):
        with pytest.raises(BadSample) as caught:
            decode_text(body, member)
        assert caught.value.cause == "bad UTF-8"
    with pytest.raises(BadSample):
        decode_category(data, "cls")


@given(st.text(), st.sampled_from(["latin-1", "cp1252", "shift_jis", "gb18030", "utf-16-le"]))
def test_no_text_becomes_another_one(text, encoding):
    """The text itself or a refusal, but for bytes that are UTF-8 as well."""
    data = text.encode(encoding, "ignore")
    try:
        got, _ = decode_text(data, "txt")
    except BadSample:
        return
    assert got == " ".join(data.decode("utf-8-sig").rstrip("\0").replace("\ufeff", "").split())


@given(
    st.text(alphabet=st.characters(exclude_characters="\0\x1b\ufeff", exclude_categories=["Cs"]))
)
def test_utf_8_is_kept(text):
    if text.split():
        assert decode_text(text.encode(), "txt") == (" ".join(text.split()), False)


def test_padding_and_marks_inside():
    assert decode_text(b"a dog\0\0\0", "txt") == ("a dog", False)
    assert decode_text('{"caption": "\ufeffa dog"}'.encode(), "json:caption") == ("a dog", False)
    assert decode_text("\ufeff\ufeffa dog".encode(), "txt") == ("a dog", False)


def test_labels_are_integers_and_nothing_that_python_takes_for_one():
    assert decode_category('{"label": "\ufeff3 "}'.encode(), "json:label") == 3
    for data in (b"1_0", b"n01440764", "\ufeff-1".encode(), b"1 2"):
        with pytest.raises(BadSample, match="bad category"):
            decode_category(data, "cls")


def test_a_stream_counts_them_and_names_the_remedy(tmp_path):
    captions = [text.encode() for text in TEXTS] * 3
    captions[4] = "犬".encode("shift_jis")
    captions[5] = MARKS["utf-16-le"] + "犬と猫".encode("utf-16-le")
    members = [(f"{n:02d}.{kind}", data) for n, caption in enumerate(captions)
               for kind, data in (("jpg", jpeg(n)), ("txt", caption))]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind="text", progress=False)
    source = make_source("pairs", str(tmp_path / "i.parquet"), "text")
    loader = make_stream([source], max_bad_rate=1.0).loader(start=0, micro_batch=5, end=15)
    keys = {key[-2:] for batch in loader for key in batch.key}
    assert dict(loader.faults) == {"bad UTF-8": 1}
    assert "04" not in keys
    assert "05" in keys
    strict = make_stream([source], max_bad_rate=0.0).loader(start=0, micro_batch=5, end=15)
    with pytest.raises(RuntimeError, match=r"1 bad UTF-8: texts must be UTF-8.*iconv"):
        list(strict)
