"""Building shards from unseen collections, and the commands around them."""

from __future__ import annotations

import argparse
import csv
import json
import tarfile
import zipfile
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.shards import jpeg, text_members, write_tar
from helpers.streams import make_stream
from m3i_scale.data import load_labelled
from m3i_scale.data.index import Index
from m3i_scale.shards import commands, writing
from m3i_scale.shards.build import Recipe, build_shards
from m3i_scale.shards.inspect import source_of


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three categories of images, one of them broken."""
    for number in range(30):
        path = tmp_path / "images" / ("cat", "dog", "ünicorn")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (40 + number, 30)))
    (tmp_path / "images" / "cat" / "broken.jpg").write_bytes(b"broken")
    (tmp_path / "images" / "cat" / "notes.md").write_text("not an image")
    return tmp_path / "images"


def test_folder_to_stream(folder, tmp_path):
    code = run(
        "shards", "build", str(folder), str(tmp_path / "out"), "--shard-samples", "11", "-j2"
    )
    assert code == 0
    index = Index(str(tmp_path / "out.parquet"))
    assert index.samples == 30
    assert 9 <= index.counts.min() <= index.counts.max() <= 11  # one record was broken
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "ünicorn"]
    labelled = load_labelled(source_of(index.path), 16)
    assert labelled.category.bincount().tolist() == [10, 10, 10]
    batch = next(iter(make_stream([source_of(index.path)]).loader(start=0, micro_batch=30)))
    assert sorted(batch.category.tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    labels = []
    for shard in sorted((tmp_path / "out").glob("*.tar")):  # shuffled, in WebDataset's layout
        with tarfile.open(shard) as tar:
            assert {name.split(".")[1] for name in tar.getnames()} == {"cls", "jpg"}
            labels += [tar.extractfile(n).read() for n in tar.getnames() if n.endswith(".cls")]
    assert len(labels) == 30
    assert labels != sorted(labels)


def test_webdataset_reads_what_we_write(folder, tmp_path):
    import webdataset

    build_shards(str(folder), tmp_path / "out", progress=False)
    data = webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False)
    samples = list(data.decode("pil").to_tuple("jpg", "cls"))
    assert len(samples) == 30
    assert {label for _, label in samples} == {0, 1, 2}


def test_captions_beside_images(tmp_path):
    for number in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes(jpeg(number))
        (tmp_path / "in" / f"{number}.txt").write_text(f"caption {number}")
    build_shards(str(tmp_path / "in"), tmp_path / "out", progress=False)
    got = load_labelled(source_of(f"{tmp_path}/out.parquet"), 8)
    assert sorted(got.captions) == [f"caption {n}" for n in range(4)]
    assert got.category.tolist() == [-1] * 4


def test_csv_with_paths(folder, tmp_path):
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title", "label"])
        for path in sorted(folder.rglob("*.jpg"))[:6]:
            writer.writerow([str(path.relative_to(tmp_path)), f"a {path.parent.name}", "7"])
    build_shards(str(table), tmp_path / "out", progress=False)
    got = load_labelled(source_of(f"{tmp_path}/out.parquet"), 8)
    assert len(got.captions) == 6 - 1 * any(
        "broken" in str(p) for p in sorted(folder.rglob("*.jpg"))[:6]
    )
    assert set(got.category.tolist()) == {7}


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_bytes(tmp_path, nested):
    images = [{"bytes": jpeg(n), "path": None} if nested else jpeg(n) for n in range(12)]
    table = pa.table({"image": images, "caption": [f"c{n}" for n in range(12)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    build_shards(str(tmp_path / "t.parquet"), tmp_path / "out", progress=False)
    got = load_labelled(source_of(f"{tmp_path}/out.parquet"), 8)
    assert sorted(got.captions) == sorted(f"c{n}" for n in range(12))


def test_archives_one_per_category_and_captioned_and_zipped(tmp_path):
    for name, first in (("n01", 0), ("n02", 5)):
        write_tar(
            tmp_path / f"{name}.tar", [(f"{n}.JPEG", jpeg(n)) for n in range(first, first + 5)]
        )
    build_shards(f"{tmp_path}/n0?.tar", tmp_path / "classes", progress=False)
    got = load_labelled(source_of(f"{tmp_path}/classes.parquet"), 8)
    assert sorted(got.category.tolist()) == [0] * 5 + [1] * 5
    write_tar(tmp_path / "laion.tar", text_members(0, 6))
    build_shards(f"{tmp_path}/laion.tar", tmp_path / "pairs", progress=False)
    assert len(load_labelled(source_of(f"{tmp_path}/pairs.parquet"), 8).captions[0]) > 0
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for n in range(4):
            file.writestr(f"class{n % 2}/{n}.jpg", jpeg(n))
    build_shards(f"{tmp_path}/a.zip", tmp_path / "zipped", progress=False)
    assert sorted(load_labelled(source_of(f"{tmp_path}/zipped.parquet"), 8).category) == [
        0,
        0,
        1,
        1,
    ]


def test_resize_and_reencode(folder, tmp_path):
    build_shards(str(folder), tmp_path / "out", recipe=Recipe(resize=16), progress=False)
    from m3i_scale.data.sequential import walk

    shapes = {tuple(s.image.shape) for _, s in walk(source_of(f"{tmp_path}/out.parquet"))}
    assert all(min(shape[:2]) == 16 for shape in shapes)


def test_an_interrupted_build_goes_on_and_two_builds_do_not_mix(folder, tmp_path, monkeypatch):
    written, original = [], writing.encode

    def interrupted(data, recipe):
        written.append(1)
        if len(written) == 20:
            raise KeyboardInterrupt
        return original(data, recipe)

    monkeypatch.setattr(writing, "encode", interrupted)
    options = {"shard_samples": 8, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        build_shards(str(folder), tmp_path / "out", **options)
    summary = build_shards(str(folder), tmp_path / "out", **options)
    assert summary.index.samples == 30
    assert summary.left_out == {"undecodable image": 1}
    assert len(written) == 20 + 31 - 15  # the two shards that were complete are not written again
    with pytest.raises(ValueError, match="holds another build"):
        build_shards(str(copytree(folder, tmp_path / "others")), tmp_path / "out", **options)


def test_the_few_without_a_caption_are_left_out_and_counted(tmp_path, capsys):
    rows = [("a.jpg", "one"), ("b.jpg", "two"), ("c.jpg", ""), ("d.jpg", "four")]
    for number, (name, _) in enumerate(rows):
        (tmp_path / name).write_bytes(jpeg(number))
    table = tmp_path / "table.csv"
    table.write_text("path,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    assert run("shards", "build", str(table), str(tmp_path / "out")) == 0
    assert "1 not written: no caption" in capsys.readouterr().out
    labelled = load_labelled(source_of(str(tmp_path / "out.parquet")), 16)
    assert sorted(labelled.captions) == ["four", "one", "two"]


def test_bad_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        build_shards(str(tmp_path / "empty"), tmp_path / "out")
    (tmp_path / "empty" / "a.jpg").write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"neither captions nor categories.* one folder for all"):
        build_shards(str(tmp_path / "empty"), tmp_path / "out")
    (tmp_path / "empty" / "b.jpg").write_bytes(jpeg())
    (tmp_path / "empty" / "b.txt").write_text("only b has one")
    with pytest.raises(ValueError, match=r"only 1 of 2 images .* have a caption; .*a.jpg has not"):
        build_shards(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(ValueError, match="neither a folder"):
        build_shards(str(tmp_path / "gone*"), tmp_path / "out")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        build_shards(str(tmp_path / "t.csv"), tmp_path / "out")


def test_check_and_show(folder, tmp_path, capsys):
    members = text_members(0, 12)
    members[0] = ("000000000.jpg", b"broken")
    del members[5]
    write_tar(tmp_path / "a.tar", members)
    index = str(tmp_path / "i.parquet")
    assert (
        run("shards", "index", str(tmp_path / "a.tar"), "-o", index, "--kind", "text", "-j1") == 0
    )
    assert run("shards", "check", index, "-o", str(tmp_path / "bad.csv")) == 1
    assert "1 undecodable image" in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / "bad.csv").open()))
    assert ["undecodable image", "a.tar", "000000000"] in rows
    assert ["no txt", "a.tar", "000000001"] in rows
    assert run("shards", "show", index, "-o", str(tmp_path / "s.png"), "--count", "8") == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
