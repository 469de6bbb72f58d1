"""YAML as the configuration reads it: nothing is lost, doubled or turned into something else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from m3i_scale.config import ConfigError, load_config
from m3i_scale.config.yaml_text import dump, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),
        ("2E3", 2000.0),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("-3", -3),
        ("50_000_000", 50_000_000),
        ("0x10", 16),
        ("007", "007"),
        ("12:30", "12:30"),
        ("2026-11-26", "2026-11-26"),
        ("", None),
        ("[1e-4, a]", [1e-4, "a"]),
        ("my run #2", "my run #2"),
        ("#2", "#2"),
        ("64 # half", "64 # half"),
        ("a#b", "a#b"),
        ("'a # b'", "a # b"),
        ('["a # b", c]', ["a # b", "c"]),
    ],
)
def test_a_value_is_taken_whole(text: str, value: object):
    found = parse_value(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"a" # b', "lost as a comment"),
        ("[1, 2 # 3]", "lost as a comment"),
        ("[1,  # one\n 2]", "lost as a comment"),
        ("[1, 2", "not valid YAML"),
        ("{a: 1, b: 2, a: 3}", "'a' stands twice"),
        ("{1: a}", "a key must be text"),
        ("{yes: a}", "a key must be text"),
        ("{[a]: b}", "a key must be text"),
        ("&a [*a]", "contains itself"),
        ("!!python/name:os.system x", "the tag"),
        ("!!python/object/apply:os.getcwd []", "the tag"),
        ("!!binary aGk=", "the tag"),
        ("!!int x", "invalid literal"),
        ("{<<: 3}", "must name a mapping"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, words: str):
    with pytest.raises(ConfigError) as caught:
        parse_value(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: 2\na: 3\n",
        "x:\n  - {y: 1}\nb: 2\nb: 3\n",
        'a: 1\n\n"a": 3\n',
        "m: &m {a: 1}\n<<: *m\n<<: *m\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str):
    last = len(text.splitlines())
    with pytest.raises(ConfigError, match=f"^line {last}: the key '.+' stands twice"):
        parse(text)


def test_a_merged_mapping_gives_way_to_what_is_written_beside_it():
    document = parse("low: &low {a: 1, b: {c: 2}}\nhigh:\n  <<: *low\n  a: 3\n")
    assert document.value["high"] == {"a": 3, "b": {"c": 2}}
    assert document.lines["high", "a"] == 4
    document.value["high"]["b"]["c"] = 5
    assert document.value["low"]["b"]["c"] == 2  # a value each
    first = parse("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}")
    assert first.value["c"] == {"x": 1, "y": 2}


def test_aliases_of_aliases_do_not_fill_the_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="more than"):
        parse("\n".join(lines))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str):
    assert parse("run: glyphs-\u00e4".encode(encoding)).value == {"run": "glyphs-\u00e4"}


def test_bytes_that_are_no_text_are_one_sentence():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse(b"run: \xe4\xff")


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False)
LOOKALIKES = st.sampled_from(
    ["1e5", "007", "1:30", "2026-01-01", "yes", "~", "=", "0o7", "1_0", ""]
)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | LOOKALIKES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | LOOKALIKES, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(TREES)
def test_what_is_written_is_read_back(tree: Any):
    assert parse(dump(tree)).value == tree


@given(st.dictionaries(WORDS, WORDS | LOOKALIKES, max_size=3))
def test_text_stays_text_in_other_readers(tree: Any):
    assert yaml.safe_load(dump(tree)) == tree


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool x",
        "a: !!int ''",
        "a: !!float ''",
        'a: "\\UFFFFFFFF"',
        'a: "\\U00110000"',
        "a: 0x" + "f" * 5000,
    ],
    ids=lambda text: text[:20],
)
def test_what_pyyaml_stumbles_over_is_refused_in_a_sentence(text: str):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_the_time_to_read_grows_with_the_length_alone():
    # Of each of so many keys the lines of all others were looked through: minutes, not seconds.
    text = "\n".join(f"k{n}: {n}" for n in range(20_000))
    begun = time.process_time()
    assert len(parse(text).value) == 20_000
    assert time.process_time() - begun < 60


def test_half_characters_name_no_file(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text('base: "\\uD800.yaml"')
    with pytest.raises(ConfigError, match="cannot be the name of a file"):
        load_config(path)


def test_a_file_without_end_is_no_configuration():
    with pytest.raises(ConfigError, match="more than 4 MiB"):
        load_config(Path("/dev/zero"))
