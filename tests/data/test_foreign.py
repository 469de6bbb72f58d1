"""Shards and collections that other tools or nobody sensible made: indexed, built, trained on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from helpers.ranks import run_ranks
from helpers.run_folder import captioned_config
from helpers.shards import caption, jpeg, make_source, text_members, write_tar
from helpers.streams import make_stream
from m3i_scale.cli import main
from m3i_scale.data import TooManyBadSamples
from m3i_scale.data.decode import BadSample, decode_category, decode_image, decode_text
from m3i_scale.data.index import Index
from m3i_scale.shards.build import build_shards
from m3i_scale.shards.indexing import index_shards


def indexed(tmp_path: Path, paths: list[Path], kind: str) -> Index:
    output = str(tmp_path / "i.parquet")
    index_shards([str(path) for path in paths], output, kind=kind, progress=False)
    return Index(output)


def picture(number: int, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(buffer, form)
    return buffer.getvalue()


def test_folders_capitals_and_every_format(tmp_path):
    members = []
    for number, (kind, form) in enumerate(
        [("JPG", "JPEG"), ("jpeg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP"), ("tif", "TIFF")]
    ):
        name = f"./part.one/{number:03d}/{number}"
        members += [(f"{name}.{kind}", picture(number, form)), (f"{name}.TXT", b"c%d" % number)]
    index = indexed(tmp_path, [write_tar(tmp_path / "a.tar", members)], "text")
    assert index.samples == 5
    loader = make_stream([make_source("s", index.path, "text")]).loader(start=0, micro_batch=5)
    batch = next(iter(loader))
    assert len(set(batch.key)) == 5
    assert not loader.faults


def test_keys_with_dots(tmp_path):
    members = [(f"photo.{n}.v1.{kind}", data) for n in range(4)
               for kind, data in (("jpg", jpeg(n)), ("txt", b"caption"))]  # fmt: skip
    assert indexed(tmp_path, [write_tar(tmp_path / "a.tar", members)], "text").samples == 4
    # With images by WebDataset's convention the first dot counts: here a mask beside each image.
    beside = (("jpg", jpeg(0)), ("seg.png", b"mask"), ("txt", b"caption"))
    members = [(f"{n}.{kind}", data) for n in range(4) for kind, data in beside]
    assert indexed(tmp_path, [write_tar(tmp_path / "b.tar", members)], "text").samples == 4


def test_a_single_empty_block_is_damage_and_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", text_members(0, 6))
    with tarfile.open(path) as tar:
        offset = tar.getmember("000000002.json").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = bytes(512)
    path.write_bytes(bytes(data))
    assert indexed(tmp_path, [path], "text").samples >= 5


@pytest.mark.parametrize(
    "record", ["size=" + "9" * 5000, "size=\u00b2", "size=-5", "=", "path=", "size=" + "9" * 18]
)
def test_absurd_extended_headers(tmp_path, record):
    length = len(record.encode()) + 2
    while len(f"{length} {record}\n".encode()) != length:
        length += 1
    body = f"{length} {record}\n".encode()
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    extended = info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    good = write_tar(tmp_path / "a.tar", text_members(0, 3)).read_bytes()
    (tmp_path / "a.tar").write_bytes(extended + good)
    try:
        assert indexed(tmp_path, [tmp_path / "a.tar"], "text").samples <= 3
    except ValueError as error:  # the absurd size swallowed the shard
        assert "no usable sample" in str(error)  # noqa: PT017


def test_json_from_hell(tmp_path):
    assert decode_text(b'{"caption": "a \\ud800 b"}', "json:caption") == ("a b", True)
    with pytest.raises(BadSample, match="bad UTF-8"):
        decode_text(b'{"caption": "\\ud800"}', "json:caption")
    for value in (b"Infinity", b"NaN", b"1e999", b'"x"', b"[]", b"{}"):
        with pytest.raises(BadSample, match="bad category"):
            decode_category(b'{"label": %s}' % value, "json:label")
    members = [("0.jpg", jpeg(0)), ("0.json", b"[" * 100_000),
               ("1.jpg", jpeg(1)), ("1.json", b'{"caption": "good"}')]  # fmt: skip
    index = indexed(tmp_path, [write_tar(tmp_path / "a.tar", members)], "text")
    assert index.text_member == ["json:caption"]


def test_formats_that_start_programs_are_not_even_tried(monkeypatch):
    from PIL import EpsImagePlugin

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as image:  # Pillow by itself would
        assert image.format == "EPS"
    with pytest.raises(BadSample, match="cannot identify"):
        decode_image(eps)


def test_an_odd_table(tmp_path):
    """A byte order mark, float categories, short rows, missing files."""
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows = ["path,label", "0.jpg,1.0", "1.jpg,2", "2.jpg,1.0", "gone.jpg,1"]
    (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    summary = build_shards(str(tmp_path / "t.csv"), tmp_path / "out", progress=False)
    assert (summary.index.samples, summary.left_out) == (3, {"unreadable file": 1})


def test_random_damage_to_shards_stops_neither_index_nor_stream(tmp_path):
    """Bytes flipped, removed and repeated anywhere: before indexing, and after."""
    rng = np.random.default_rng(0)
    whole = write_tar(tmp_path / "a.tar", text_members(0, 6)).read_bytes()
    path = tmp_path / "b.tar"
    for number in range(40):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 30)):
            data[at] = rng.integers(256)
        cut = int(rng.integers(len(data)))
        data[cut:] = (data[cut:], b"", data[: cut // 2])[number % 3]
        path.write_bytes(whole if number % 2 else bytes(data))
        try:
            index = indexed(tmp_path, [path], "text")
        except ValueError as error:
            assert "no usable sample" in str(error)  # noqa: PT017
            continue
        path.write_bytes(bytes(data))
        stream = make_stream([make_source("s", index.path, "text")], max_bad_rate=1.0)
        try:
            batches = list(stream.loader(start=0, micro_batch=4, end=12))
        except TooManyBadSamples:
            continue
        assert sum(len(batch) for batch in batches) == 12


def img2dataset_shard(path: Path, first: int, count: int) -> Path:
    """As img2dataset writes them; one pair lost its caption, one image is broken."""
    members = []
    for number in range(first, first + count):
        text = caption(number)
        note = {"caption": text, "url": f"https://x/{number}", "status": "success", "exif": "{}"}
        image = b"broken" if number == first + 3 else jpeg(number, (80, 72))
        members += [(f"{number:09d}.jpg", image), (f"{number:09d}.json", json.dumps(note).encode())]
        if number != first + 5:
            members.append((f"{number:09d}.txt", text.encode()))
    return write_tar(path, members)


def train_on(world, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """What `train.py` does with the small configuration."""
    from helpers.training import train
    from m3i_scale.engine import session
    from m3i_scale.tasks.pretraining import Pretraining

    task = Pretraining(captioned_config(folder, overrides))
    stream = task.open_stream()
    run = session.open_run(task, world, stream, epoch_samples=stream.samples, resume="never")
    return {"finished": train(run), "step": run.progress.step}


@pytest.mark.distributed
def test_foreign_shards_and_an_unseen_collection_train_end_to_end(tmp_path):
    for shard in range(2):
        img2dataset_shard(tmp_path / "laion" / f"{shard:05d}.tar", 10 * shard, 10)
    pattern = str(tmp_path / "wds" / "train-%03d.tar")
    Path(pattern).parent.mkdir()
    with webdataset.ShardWriter(pattern, maxcount=6, verbose=0) as writer:
        for number in range(12):
            writer.write({"__key__": f"val/n{number:04d}", "jpg": jpeg(number, (90, 70)),
                          "cls": number % 5, "json": {"any": "thing"}})  # fmt: skip
    for number in range(9):  # an image collection: a folder per category
        path = tmp_path / "photos" / f"kind {number % 3}" / f"IMG.{number}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "PNG"))
    index = {name: str(tmp_path / f"{name}.parquet") for name in ("laion", "wds", "built")}
    command = ["shards", "index", "-j1", "--kind"]
    assert main([*command, "text", f"{tmp_path}/laion/*.tar", "-o", index["laion"]]) == 0
    assert main([*command, "category", f"{tmp_path}/wds/*.tar", "-o", index["wds"]]) == 0
    assert main(["shards", "build", f"{tmp_path}/photos", f"{tmp_path}/built", "-j1"]) == 0
    assert [Index(path).samples for path in index.values()] == [18, 12, 9]
    kinds = {"laion": "text", "wds": "category", "built": "category"}
    overrides = {
        "data.sources": [{"name": n, "index": index[n], "kind": kind} for n, kind in kinds.items()],
        "data.max_bad_rate": 0.5,
        "optimizer.global_batch_size": 40,  # of 39 samples: every one is met
        "optimizer.max_micro_batch": 40,
        "optimizer.duration": "2 steps",
        "optimizer.warmup": "1 steps",
    }
    results = run_ranks(1, train_on, tmp_path, overrides=overrides)
    assert results == [{"finished": True, "step": 2}]
    metrics = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss/total"] for line in metrics]).all()
