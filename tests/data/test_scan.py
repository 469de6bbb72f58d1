"""What people's tars look like, and what is said about them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.shards import jpeg, text_members, write_tar
from m3i_scale.data.index import Index
from m3i_scale.data.sequential import walk
from m3i_scale.shards.build import build_shards
from m3i_scale.shards.groups import Member, group_members
from m3i_scale.shards.indexing import IndexSummary, index_shards
from m3i_scale.shards.inspect import source_of


def indexed(tmp_path: Path, tar: Path, kind: str = "text") -> IndexSummary:
    return index_shards([str(tar)], str(tmp_path / "i.parquet"), kind=kind, progress=False)


def sample(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", b"caption of %s" % key.encode())]


@pytest.mark.parametrize(
    "keys",
    [
        ["a.1", "a.2", "a.3", "0"],
        ["0", "a.1", "a.2"],
        ["IMG.1", "IMG.2", "IMG"],
        ["IMG", "IMG.1", "IMG.2"],
        ["x/a.b.1", "x/a.b.2", "x/0", "y.z/0"],
        ["2020.01.02-cat", "2020.01.03-cat", "cat"],
    ],
)
def test_plain_and_dotted_keys_side_by_side(tmp_path, keys):
    members = [m for number, key in enumerate(keys) for m in sample(key, number)]
    tar = write_tar(tmp_path / "a.tar", members)
    assert indexed(tmp_path, tar).samples == len(keys)
    assert [s.text for _, s in walk(source_of(f"{tmp_path}/i.parquet"))] == [
        f"caption of {key}" for key in keys
    ]


# Neighbours with one key are one run, so keys differ at least before the first dot or are whole.
KEY = st.lists(st.sampled_from(["a", "b1", "2020", "v2"]), min_size=1, max_size=3).map(".".join)


@given(st.lists(KEY, unique=True, min_size=1, max_size=8))
def test_no_sample_is_lost_whatever_the_dots(keys):
    members = [Member(f"{key}.{kind}", 0, 1) for key in keys for kind in ("jpg", "txt")]
    found = [group.key for group in group_members(members)]
    assert sorted(found) == sorted(keys)


def test_endings_of_two_parts_and_other_spellings(tmp_path):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(buffer, "JPEG2000")
    members = [
        *[("0.image.jpg", jpeg()), ("0.caption.txt", b"two parts")],
        *[("1.jfif", jpeg()), ("1.caption.txt", b"jfif")],
        *[("2.jp2", buffer.getvalue()), ("2.caption.txt", b"jp2")],
        *[("3.JPE", jpeg()), ("3.CAPTION.TXT", b"JPE")],
        *[("4.heic", b"?"), ("4.caption.txt", b"unknown")],
    ]
    summary = indexed(tmp_path, write_tar(tmp_path / "a.tar", members))
    got = [s.text for _, s in walk(source_of(f"{tmp_path}/i.parquet"))]
    assert got == ["two parts", "jfif", "jp2", "JPE"]
    assert summary.problems == {"no image": 1}
    assert "sample 4, which has caption.txt, heic" in str(summary)


def test_what_macs_and_notebooks_leave_is_no_sample(tmp_path):
    members = [
        *[("__MACOSX/._0.jpg", b"x"), ("./._0.jpg", b"x"), (".DS_Store", b"x")],
        *sample("./0"),
        *sample(".ipynb_checkpoints/0-checkpoint"),
    ]
    summary = indexed(tmp_path, write_tar(tmp_path / "a.tar", members))
    assert (summary.samples, summary.problems) == (1, {})


@pytest.mark.parametrize("padding", [1024, 10240, 20480])
def test_joined_tars_are_read_to_the_end(tmp_path, padding):
    parts = [write_tar(tmp_path / f"{n}.tar", text_members(3 * n, 3)).read_bytes() for n in (0, 1)]
    bare = [part.rstrip(b"\0") for part in parts]
    bare = [part + bytes(-len(part) % 512) for part in bare]
    (tmp_path / "ab.tar").write_bytes(bare[0] + bytes(padding - len(bare[0]) % 512) + bare[1])
    summary = indexed(tmp_path, tmp_path / "ab.tar")
    assert summary.samples == 6


def test_tars_joined_by_cat_are_no_damage(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", text_members(3 * n, 3)).read_bytes() for n in (0, 1)]
    (tmp_path / "ab.tar").write_bytes(b"".join(parts))
    summary = indexed(tmp_path, tmp_path / "ab.tar")
    assert (summary.samples, summary.problems) == (6, {})


@pytest.mark.parametrize("start", range(0, 60, 5))
def test_a_hole_of_zeros_never_goes_unsaid(tmp_path, start):
    tar = write_tar(tmp_path / "a.tar", text_members(0, 12))
    data = bytearray(tar.read_bytes())
    data[start * 512 : (start + 25) * 512] = bytes(25 * 512)
    tar.write_bytes(data)
    summary = indexed(tmp_path, tar)
    assert 0 < summary.samples < 12
    assert "corrupt tar header" in summary.problems


def test_a_long_tail_of_zeros_is_said(tmp_path):
    tar = write_tar(tmp_path / "a.tar", text_members(0, 3))
    with open(tar, "ab") as file:
        file.truncate(4 << 20)  # as a download that reserved its space and broke off
    summary = indexed(tmp_path, tar)
    assert (summary.samples, summary.problems) == (3, {"corrupt tar header": 1})


def test_members_apart_are_named_and_a_build_joins_them(tmp_path):
    members = text_members(0, 4)
    members = [*members[0::3], *members[2::3]]
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"not side by side(.|\n)*tar --sort=name"):
        indexed(tmp_path, tar)
    assert build_shards(str(tar), tmp_path / "o", progress=False).index.samples == 4
    assert len(Index(f"{tmp_path}/o.parquet").shards) == 1


def test_captions_that_are_nothing_are_left_out_of_json(tmp_path):
    documents = [b'{"caption": "a"}', b'{"caption": null}', b'{"caption": ""}', b"{", b'{"x": 1}']
    members = [m for n, d in enumerate(documents) for m in ((f"{n}.jpg", jpeg()), (f"{n}.json", d))]
    summary = indexed(tmp_path, write_tar(tmp_path / "a.tar", members))
    assert (summary.samples, summary.problems) == (1, {"no caption": 3, "bad JSON": 1})


@pytest.mark.parametrize("endings", [("jpg",), ("jpg", "json")])
def test_a_key_that_begins_like_another_is_another(endings):
    keys = ["photo", "photo.1", "photo.copy", "b"]
    members = [Member(f"{key}.{kind}", 0, 1) for key in keys for kind in endings]
    assert sorted(group.key for group in group_members(members)) == sorted(keys)


def test_a_mask_beside_every_picture_is_no_sample():
    kinds = ("jpg", "seg.png", "seg.json", "txt")
    members = [Member(f"{key}.{kind}", 0, 1) for key in range(4) for kind in kinds]
    groups = group_members(members)
    assert [group.key for group in groups] == ["0", "1", "2", "3"]
    assert all(group.image() == group.members["jpg"] for group in groups)
