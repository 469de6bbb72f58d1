"""Builds and indexes that are interrupted, run again, run twice, or run out of space."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.shards import jpeg, text_members, write_tar
from m3i_scale.config import Storage
from m3i_scale.data.sequential import walk
from m3i_scale.data.storage import StorageClient
from m3i_scale.shards import build, indexing
from m3i_scale.shards.build import Recipe, build_shards
from m3i_scale.shards.indexing import index_shards
from m3i_scale.shards.inspect import source_of


@pytest.fixture
def table(tmp_path) -> Path:
    (tmp_path / "imgs").mkdir()
    for number in range(12):
        (tmp_path / "imgs" / f"{number}.jpg").write_bytes(jpeg(number))
    return write_table(tmp_path, "old")


def write_table(folder: Path, word: str, only: int = -1, count: int = 12) -> Path:
    rows = [f"imgs/{n}.jpg,{word if only in (-1, n) else 'old'} {n},x{n}" for n in range(count)]
    (folder / "t.csv").write_text("\n".join(["path,caption,title", *rows]) + "\n")
    return folder / "t.csv"


def built(table: Path, **options) -> tuple[list[str], str]:
    """(captions, the summary) of a build beside the table."""
    options = {"shard_samples": 4, "progress": False, **options}
    summary = build_shards(str(table), table.parent / "out", **options)
    samples = [s for _, s in walk(source_of(f"{table.parent}/out.parquet"))]
    return [sample.text for sample in samples], str(summary)


def times(table: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((table.parent / "out").glob("*.tar"))]


def test_what_has_not_changed_stays(table):
    first, _ = built(table)
    before = times(table)
    assert len(before) == 3
    again, said = built(table)
    assert (again, times(table)) == (first, before)
    assert "0 shards written, 3 unchanged" in said


def test_a_mended_image_and_a_corrected_caption_rewrite_their_shard_alone(table):
    built(table)
    before = times(table)
    write_table(table.parent, "new", only=5)
    texts, said = built(table)
    assert "1 shards written, 2 unchanged" not in said or sum(t.startswith("new") for t in texts)
    assert "new 5" in texts
    (table.parent / "imgs" / "3.jpg").write_bytes(jpeg(99))
    changed = [a != b for a, b in zip(before, times(table), strict=True)]
    _, said = built(table)
    assert "1 shards written, 2 unchanged" in said
    assert any(changed)


def test_images_that_come_back_are_taken(table):
    away = table.parent / "imgs" / "7.jpg"
    data = away.read_bytes()
    away.unlink()
    texts, said = built(table)
    assert len(texts) == 11
    assert f"1 not written: unreadable file ({away}" in said
    _, said = built(table)
    assert "0 shards written, 3 unchanged" in said  # still away: nothing to do
    away.write_bytes(data)
    assert len(built(table)[0]) == 12


@pytest.mark.parametrize(
    "options", [{"text_column": "title"}, {"recipe": Recipe(resize=8)}, {"seed": 1}]
)
def test_other_options_build_anew_and_say_so(table, options):
    built(table)
    before = times(table)
    texts, said = built(table, **options)
    assert "than in the last build" in said
    assert not set(times(table)) & set(before)
    assert ("x0" in texts) == ("text_column" in options)


def test_shards_of_a_larger_build_go(table):
    built(table)
    write_table(table.parent, "old", count=4)
    texts, said = built(table)
    assert len(texts) == 4
    assert "2 removed" in said
    assert sorted(p.name for p in (table.parent / "out").glob("0*")) == ["00000.json", "00000.tar"]


@pytest.mark.parametrize("name", ["00001.json", "build.json"])
@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"fingerprint": 1'])
def test_notes_that_a_crash_left_half_written(table, name, text):
    first, _ = built(table)
    (table.parent / "out" / name).write_text(text)
    assert built(table)[0] == first


def test_a_shard_that_lost_its_end_is_written_again(table):
    first, _ = built(table)
    shard = table.parent / "out" / "00001.tar"
    os.truncate(shard, 2000)
    assert built(table)[0] == first


def test_a_folder_of_other_tars_is_left_alone(tmp_path):
    write_tar(tmp_path / "in" / "00000.tar", text_members(0, 3))
    with pytest.raises(ValueError, match="that no build wrote"):
        build_shards(f"{tmp_path}/in/*.tar", tmp_path / "in", progress=False)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["00000.tar"]


def test_two_builds_in_one_folder_at_once(table):
    built(table)
    with (
        build._locked(table.parent / "out"),
        pytest.raises(ValueError, match="another process builds"),
    ):
        built(table)


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_done(table):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*0000\d\.tar: .*make room"):
            built(table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in (table.parent / "out").iterdir()} <= {"build.json", "build.lock"}
    assert len(built(table)[0]) == 12


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A build with two workers that is in the middle of its shards."""
    for number in range(400):
        path = folder / "in" / f"c{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number % 7, (300, 300)))
    words = ["shards", "build", f"{folder}/in", f"{folder}/out", "--resize", "128", "-j2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "m3i_scale.cli", *words, "--shard-samples", "20"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while process.poll() is None and len(list((folder / "out").glob("*.tar"))) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return process


def group_members(group: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130), (signal.SIGKILL, False, -9)],
)
def test_workers_end_with_their_parent(tmp_path, number, whole_group, code):
    process = start(tmp_path)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in said
    limit = time.monotonic() + 10
    while group_members(process.pid) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not group_members(process.pid)
    if code != -9:
        assert not list((tmp_path / "out").glob("*.tmp"))
    kept = len(list((tmp_path / "out").glob("*.tar")))
    summary = build_shards(
        f"{tmp_path}/in", tmp_path / "out", recipe=Recipe(resize=128), shard_samples=20,
        progress=False,
    )  # fmt: skip
    assert summary.index.samples == 400
    assert 2 <= kept <= 20
    assert not list((tmp_path / "out").glob("*.tmp"))


class Outage(StorageClient):
    """Storage that cannot read one shard while `down`."""

    down = True

    def open(self, url, **options):
        if self.down and url.endswith("1.tar"):
            raise ConnectionError("503")
        return super().open(url, **options)


def test_an_outage_is_no_result(tmp_path, monkeypatch):
    paths = [str(write_tar(tmp_path / f"{n}.tar", text_members(3 * n, 3))) for n in range(3)]
    storage, output = Outage(Storage(retries=1), first_wait=0.01), str(tmp_path / "i.parquet")
    options = {"kind": "text", "storage": storage, "progress": False}
    with pytest.raises(indexing.ShardsUnreached, match=r"(?s)1 of 3 shards.*1\.tar: unreadable"):
        index_shards(paths, output, **options)
    assert not Path(output).exists()
    partial = index_shards(paths, str(tmp_path / "p.parquet"), skip_unreached=True, **options)
    assert (partial.samples, partial.problems) == (6, {"unreadable shard": 1})
    storage.down, scanned = False, []
    original = indexing.index_shard
    monkeypatch.setattr(
        indexing, "index_shard", lambda name, *rest: scanned.append(name) or original(name, *rest)
    )
    assert index_shards(paths, output, **options).samples == 9
    assert scanned == [paths[1]]  # the others were kept


def test_a_shard_that_changed_between_two_attempts_is_scanned_again(tmp_path):
    shard = write_tar(tmp_path / "0.tar", text_members(0, 3))
    gone, output = str(tmp_path / "1.tar"), str(tmp_path / "i.parquet")
    with pytest.raises(ValueError, match="missing shard"):
        index_shards([str(shard), gone], output, kind="text", progress=False)
    members = text_members(0, 3)
    write_tar(shard, [*members[3:6], *members[0:3], *members[6:]])  # of the same length
    write_tar(Path(gone), text_members(9, 1))
    index_shards([str(shard), gone], output, kind="text", progress=False)
    texts = [sample.text for _, sample in walk(source_of(output))]
    assert texts == ["caption 1", "caption 0", "caption 2", "caption 9"]
