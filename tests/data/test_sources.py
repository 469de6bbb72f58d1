"""Paths as people write them, and sources as they lie on people's disks."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from argparse import ArgumentTypeError
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.shards import jpeg, text_members, write_tar
from m3i_scale.arguments import path
from m3i_scale.cli import main
from m3i_scale.data.labels import read_classes
from m3i_scale.data.sequential import walk
from m3i_scale.data.storage import StorageClient
from m3i_scale.shards.build import build_shards
from m3i_scale.shards.inspect import source_of
from m3i_scale.shards.sources import find_files


def names(*patterns: str, endings: tuple[str, ...] = (".tar",)) -> list[str]:
    return [os.path.basename(path) for path in find_files(patterns, endings, StorageClient())]


@pytest.fixture
def tars(tmp_path) -> Path:
    for name in ("000.tar", "001.tar", "002.tar", "010.tar", "notes.txt"):
        (tmp_path / "s [v1]").mkdir(exist_ok=True)
        (tmp_path / "s [v1]" / name).touch()
    return tmp_path / "s [v1]"


def test_braces_globs_folders_and_brackets(tars):
    assert names(f"{tars}/{{000..002}}.tar") == ["000.tar", "001.tar", "002.tar"]
    assert names(f"{tars}/{{000..002..2}}.tar") == ["000.tar", "002.tar"]
    assert names(f"{tars}/{{001,010}}.tar") == ["001.tar", "010.tar"]
    assert names(f"{tars}/{{000..001}}.tar::{tars}/010.tar") == ["000.tar", "001.tar", "010.tar"]
    assert names(f"{tars}/00{{0,[12]}}.tar") == ["000.tar", "001.tar", "002.tar"]
    assert names(f"{tars}/*.tar") == ["000.tar", "001.tar", "002.tar", "010.tar"]
    assert names(f"{tars}/00[0-1].tar") == ["000.tar", "001.tar"]
    assert names(str(tars)) == names(f"{tars}/") == names(f"{tars}/*.tar")
    assert names(str(tars.parent)) == names(str(tars))  # none beside, some below
    assert names(f"{tars}/000.tar", f"{tars}/*0.tar") == ["000.tar", "010.tar"]


def test_a_name_that_exists_by_the_letter_is_taken_by_the_letter(tmp_path):
    for name in ("a[1].tar", "b{0..1}.tar", "$x.tar", "c*.tar"):
        (tmp_path / name).touch()
        assert names(str(tmp_path / name)) == [name]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{000..002.tar", "braces do not match"),
        ("*.tarr", "no shard matches .*nearest name"),
        ("*.parquet", "no shard matches .*holds 000.tar"),
        ("01?.tr", "no shard matches .*nearest name .* is 010.tar"),
        ("../gone/*.tar", "there is no folder"),
        ("../empty", "is a folder without .tar files: .* is empty"),
    ],
)
def test_what_matches_nothing_is_told_apart(tars, pattern, said):
    (tars.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=said):
        names(os.path.join(tars, pattern))


def test_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert path("~/a.tar") == f"{tmp_path}/a.tar"
    assert path("$SCRATCH/${SCRATCH}x") == "/scratch/me//scratch/mex"
    assert path("s3://b/$SCRATCH") == "s3://b//scratch/me"
    assert path("pipe:cat $HOME/x") == "pipe:cat $HOME/x"
    with pytest.raises(ArgumentTypeError, match="variable NOT_SET is not set"):
        path("$NOT_SET/a.tar")
    with pytest.raises(ArgumentTypeError, match="no user 'nobody-here'"):
        path("~nobody-here/a.tar")


def test_the_commands_expand_paths(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "c" / "0.tar", text_members(0, 30))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "c"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert main(["shards", "index", "$DATA", "-o", "~/i.parquet", "--kind", "text", "-j1"]) == 0
    assert main(["shards", "build", "$DATA", "~/built", "-j1"]) == 0
    assert main(["shards", "check", "~/i.parquet"]) == 0
    assert main(["tokenizer", "~/i.parquet", "--vocab-size", "90", "--out=~/t.json"]) == 0
    # What a variable stands for is not expanded again, nor is what exists by the letter.
    (tmp_path / "$odd").mkdir()
    (tmp_path / "c" / "0.tar").rename(tmp_path / "$odd" / "0.tar")
    monkeypatch.setenv("DATA", str(tmp_path / "$odd"))
    for name in ("$DATA/*.tar", f"{tmp_path}/$odd"):
        assert main(["shards", "index", name, "-o", "~/$$i.parquet", "--kind", "text", "-j1"]) == 0
    assert main(["shards", "check", "~/$$i.parquet"]) == 0
    assert (
        main(["tokenizer", f"{tmp_path}/$i.parquet", "--vocab-size", "90", "--out=~/t.json"]) == 0
    )
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "check", "$GONE/i.parquet"])
    assert "GONE is not set" in capsys.readouterr().err
    assert not list((tmp_path / "cwd").iterdir())


def class_folders(root: Path, *classes: str) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for copy in range(2):
            (root / name / f"{copy}.jpg").write_bytes(jpeg(number))
    return root


def test_links_are_followed_once(tmp_path):
    real = class_folders(tmp_path / "real", "a", "b")
    (tmp_path / "links").mkdir()
    for name in "ab":
        (tmp_path / "links" / name).symlink_to(real / name)
    (real / "b" / "up").symlink_to(real / "b")  # a loop
    (real / "a" / "gone.jpg").symlink_to("/nowhere.jpg")
    built = build_shards(str(tmp_path / "links"), tmp_path / "o", progress=False)
    assert built.left_out == {"unreadable file": 1}
    assert read_classes(tmp_path / "o" / "classes.json") == {"a": 0, "b": 1}


def test_what_is_no_class(tmp_path):
    folder = class_folders(tmp_path / "f", "a", "b")
    class_folders(folder, ".ipynb_checkpoints", "__MACOSX", "a/.ipynb_checkpoints", "@eaDir")
    (folder / ".DS_Store").touch()
    (folder / "a" / "._0.jpg").write_bytes(b"x")
    built = build_shards(str(folder), tmp_path / "o", progress=False)
    assert (built.index.samples, built.left_out) == (4, {})
    assert read_classes(tmp_path / "o" / "classes.json") == {"a": 0, "b": 1}


def test_folders_with_numbers_are_these_categories(tmp_path):
    build_shards(str(class_folders(tmp_path / "f", "2", "10")), tmp_path / "o", progress=False)
    assert {s.category for _, s in walk(source_of(f"{tmp_path}/o.parquet"))} == {2, 10}


def test_folders_of_img2dataset_are_no_categories(tmp_path):
    for number in range(4):
        stem = tmp_path / "f" / f"{number % 2:05d}" / f"{number:09d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".jpg").write_bytes(jpeg(number))
        stem.with_suffix(".json").write_text(json.dumps({"caption": f"c{number}"}))
    build_shards(str(tmp_path / "f"), tmp_path / "o", progress=False)
    source = source_of(f"{tmp_path}/o.parquet")
    assert source.kind == "text"
    assert sorted(s.text for _, s in walk(source)) == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_of_hugging_face(tmp_path, form):
    (tmp_path / "f" / "train").mkdir(parents=True)
    rows = [{"file_name": f"train/{n}.jpg", "text": f"c{n}"} for n in range(5)]
    for number in range(6):
        (tmp_path / "f" / "train" / f"{number}.jpg").write_bytes(jpeg(number))
    with open(tmp_path / "f" / f"metadata.{form}", "w", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    built = build_shards(str(tmp_path / "f"), tmp_path / "o", progress=False)
    assert (built.index.samples, built.left_out) == (5, {"no caption": 1})
    alone = build_shards(f"{tmp_path}/f/metadata.{form}", tmp_path / "p", progress=False)
    assert alone.index.samples == 5


def test_several_tables_lists_of_captions_and_a_named_column(tmp_path):
    for part in range(2):
        rows = range(3 * part, 3 * part + 3)
        table = {"url": ["http://127.0.0.1:9/x"] * 3, "caption": [[f"a{n}", f"b{n}"] for n in rows],
                 "photo": [jpeg(n) for n in rows], "thumb": [b"x"] * 3}  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / f"{part}.parquet")
    source = f"{tmp_path}/{{0..1}}.parquet"
    build_shards(source, tmp_path / "o", image_column="photo", progress=False)
    texts = sorted(s.text for _, s in walk(source_of(f"{tmp_path}/o.parquet")))
    assert texts == [f"a{n}" for n in range(6)]
    with pytest.raises(ValueError, match="no column 'foto'"):
        build_shards(source, tmp_path / "p", image_column="foto", progress=False)


def test_a_csv_with_url_and_jpg_takes_the_jpg(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "t.csv").write_text("URL,TEXT,jpg\nhttp://127.0.0.1:9/x,hello,0.jpg\n")
    assert build_shards(f"{tmp_path}/t.csv", tmp_path / "o", progress=False).index.samples == 1


def test_damaged_sources_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg"}\n{"image"\n')
    (tmp_path / "a.csv").write_bytes("path,caption\na.jpg,\u3042\n".encode("shift-jis"))
    (tmp_path / "a.rar").touch()
    for name, said in [("a.zip", "zip"), ("a.parquet", "Parquet"), ("a.jsonl", "line 2"),
                       ("a.csv", "utf-8"), ("a.rar", "neither"), ("b.csv", "no file")]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"(?si){name}.*{said}|{said}.*{name}"):
            build_shards(str(tmp_path / name), tmp_path / "o", progress=False)


def test_a_damaged_member_of_a_zip_costs_its_own_sample(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for number in range(6):
            file.writestr(f"c{number % 2}/{number}.jpg", jpeg(number))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(jpeg(3)) + 50] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    built = build_shards(f"{tmp_path}/a.zip", tmp_path / "o", processes=2, progress=False)
    assert (built.index.samples, built.left_out) == (5, {"unreadable file": 1})
    assert "c1/3.jpg" in str(built)


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = class_folders(tmp_path / "f", "a", os.fsdecode(b"d\xe9"))
    (folder / "a" / os.fsdecode(b"\xe9.jpg")).write_bytes(b"broken")
    assert main(["shards", "build", str(folder), f"{tmp_path}/o", "-j1"]) == 0
    assert "1 not written: undecodable image" in capsys.readouterr().out
    bad = tmp_path / os.fsdecode(b"\xe9")
    write_tar(bad / "0.tar", text_members(0, 2))
    index = ["shards", "index", "--kind", "text", "-j1"]
    assert main([*index, f"{bad}/0.tar", "-o", f"{tmp_path}/i.parquet"]) == 2
    assert "is not UTF-8: rename" in capsys.readouterr().err
    assert main([*index, f"{tmp_path}/o", "-o", f"{bad}/i.parquet"]) == 2
    assert "is not UTF-8: rename" in capsys.readouterr().err
