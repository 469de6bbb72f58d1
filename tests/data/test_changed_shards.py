"""Shards that were changed after they were indexed: noticed in the stream and by `shards check`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.shards import jpeg, make_source, write_tar
from helpers.streams import make_stream
from m3i_scale.cli import main
from m3i_scale.data import index as index_file
from m3i_scale.data.index import Index
from m3i_scale.data.sequential import walk
from m3i_scale.shards.indexing import index_shards
from m3i_scale.shards.inspect import check, source_of

MISMATCH = "shard does not match its index"
Pair = tuple[str, bytes]


def members(caption: str = "short {}", label: str = "1", form: str = "{}", count: int = 4):
    rows: list[Pair] = []
    for n in range(count):
        name = form.format(n)
        rows += [(f"{name}.jpg", jpeg(n)), (f"{name}.txt", caption.format(n).encode()),
                 (f"{name}.cls", label.encode())]  # fmt: skip
    return rows


def indexed(tmp_path: Path, rows: list[Pair], kind: str = "both", **options) -> str:
    path = write_tar(tmp_path / "s" / "0.tar", rows, **options)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind=kind, progress=False)
    return str(tmp_path / "i.parquet")


def found(index: str) -> list[str]:
    """Caption and category of every sample, or the cause why there is none."""
    return [
        f"{sample.text} {sample.category}" if hasattr(sample, "text") else sample.cause
        for _, sample in walk(source_of(index))
    ]


@pytest.mark.parametrize("kind", ["text", "category", "both"])
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(members("a much longer and corrected caption {}", "1"), id="longer captions"),
        pytest.param(members("a {}", "1"), id="shorter captions"),
        pytest.param(members("short {}", "12"), id="longer labels"),
        pytest.param(members(form="other{}"), id="other samples of the same sizes"),
        pytest.param(members()[3:] + members()[:3], id="another order"),
        pytest.param(members()[3:], id="one sample less"),
        pytest.param([("0.json", b"{}"), *members()], id="one member more"),
    ],
)
def test_what_changed_is_noticed_and_nothing_is_read_at_its_old_length(tmp_path, changed, kind):
    index = indexed(tmp_path, members(), kind)
    before = found(index)
    write_tar(tmp_path / "s" / "0.tar", changed)
    after = found(index)
    unused = {"text": ".cls", "category": ".txt"}.get(kind, "none")
    was, now = (
        [row for row in rows if not row[0].endswith(unused)] for rows in (members(), changed)
    )
    if was == now:  # only what this source does not use was changed
        assert after == before
        return
    assert MISMATCH in after
    assert set(after) <= {MISMATCH, "truncated shard", *before}
    assert check(index, progress=False).causes[MISMATCH] > 0


def test_the_stream_replaces_counts_and_stops_with_the_remedy(tmp_path, caplog):
    rows = members(count=20)
    index = indexed(tmp_path, rows)
    rows[-2:] = [("19.txt", b"a corrected caption"), ("19.cls", b"12")]
    write_tar(tmp_path / "s" / "0.tar", rows)
    loader = make_stream([make_source("s", index, "both")], max_bad_rate=1.0).loader(
        start=0, micro_batch=10, end=20
    )
    batches = list(loader)
    assert dict(loader.faults) == {MISMATCH: 1}
    assert "now they have" in caplog.text
    assert {int(category) for batch in batches for category in batch.category} == {1}
    strict = make_stream([make_source("s", index, "both")], max_bad_rate=0.0).loader(
        start=0, micro_batch=10, end=20
    )
    with pytest.raises(RuntimeError, match=f"1 {MISMATCH}: .*index it again"):
        list(strict)


def test_a_copy_with_other_times_and_owners_is_the_same_shard(tmp_path):
    index = indexed(tmp_path, members())
    before = found(index)
    with tarfile.open(tmp_path / "s" / "0.tar", "w") as tar:
        for name, data in members():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(data), 1_700_000_000, 7, "somebody"
            tar.addfile(info, io.BytesIO(data))
    assert found(index) == before
    assert str(check(index, progress=False)) == "4 samples, 0 bad"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, format):
    form = "ordner/" * 20 + "{}"
    index = indexed(tmp_path, members(form=form), format=format)
    assert found(index) == [f"short {n} 1" for n in range(4)]
    write_tar(tmp_path / "s" / "0.tar", members("short {}", "12", form), format=format)
    assert set(found(index)) == {MISMATCH}


def test_samples_appended_to_a_shard_are_reported_by_check(tmp_path, capsys):
    index = indexed(tmp_path, members(count=4))
    write_tar(tmp_path / "s" / "0.tar", members(count=40))
    assert MISMATCH not in found(index)
    assert main(["shards", "check", index]) == 1
    said = capsys.readouterr().out
    assert "4 samples, 1 bad" in said
    assert "1 shard of another length: it was changed after it was indexed: index it again" in said
    assert "s/0.tar" in said


def as_format_2(path: str) -> None:
    """What the version before this one wrote."""
    table = pq.read_table(path).drop_columns(["check"])
    summary = index_file._unpack(pq.ParquetFile(path).metadata.metadata[b"summary"])
    note = {"format": "m3i-index-2", "summary": index_file._pack(summary.drop(["fingerprint"]))}
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(note)


def test_an_index_of_the_older_format_is_read_and_compares_sizes(tmp_path, caplog):
    index = indexed(tmp_path, members())
    before = found(index)
    as_format_2(index)
    assert found(index) == before
    assert "older format" in caplog.text
    write_tar(tmp_path / "s" / "0.tar", members("a corrected caption {}"))
    assert MISMATCH in found(index)


def test_an_unknown_format_is_refused(tmp_path):
    path = str(tmp_path / "i.parquet")
    with pq.ParquetWriter(path, pa.schema([("shard", pa.string())])) as writer:
        writer.add_key_value_metadata({"format": "m3i-index-1"})
    with pytest.raises(ValueError, match="make it with `m3i shards index`"):
        Index(path)


def test_versions_of_a_shard_are_told_apart_for_the_cache(tmp_path):
    versions = [Index(indexed(tmp_path, members())).version(0)]
    versions += [Index(indexed(tmp_path, members())).version(0)]
    assert versions[0] == versions[1]
    length = (tmp_path / "s" / "0.tar").stat().st_size
    assert Index(indexed(tmp_path, members("longer {}"))).version(0) != versions[0]
    assert (tmp_path / "s" / "0.tar").stat().st_size == length  # tars are padded
