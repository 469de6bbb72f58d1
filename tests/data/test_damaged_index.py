"""An index that is damaged or says what is not so is refused, before it shifts a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.shards import make_source, text_source
from helpers.streams import make_stream
from m3i_scale.data import index as index_file
from m3i_scale.data.index import DamagedIndex, Index
from m3i_scale.engine.ending import exit_code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(text_source(tmp_path, [6]).index)


def rewritten(path: Path, notes: Any = None, **columns: list[int]) -> None:
    """Write the index again, with its own checksums, with other values in it."""
    row = pq.ParquetFile(path).read().to_pylist()[0] | columns
    table = pa.table({n: [row[n]] for n in index_file.SCHEMA.names}, schema=index_file.SCHEMA)
    index_file.write_index(str(path), [table], notes)


LIES = {
    "fewer samples than it counts": {"samples": 9},
    "none in the list": {"image_offset": []},
    "an offset before the shard": {"image_offset": [-5] * 6},
    "an offset beyond the shard": {"text_offset": [2**62] * 6},
    "a size of gigabytes": {"image_size": [2**31 - 1] * 6},
    "a negative size": {"text_size": [-2] * 6},
    "no checksums": {"check": []},
    "an endless shard": {"bytes": 2**62, "image_size": [2**31 - 1] * 6},
    "members far from each other": {"bytes": 2**62, "text_offset": [2**40] * 6},
}


# Once through a worker process, which hands errors over as texts.
@pytest.mark.parametrize(("lie", "workers"), [*((lie, 0) for lie in LIES), ("no checksums", 2)])
def test_what_cannot_be_is_refused_when_it_is_looked_up(path: Path, lie: str, workers: int):
    rewritten(path, **LIES[lie])
    stream = make_stream([make_source("s", str(path), "text")], max_bad_rate=1.0)
    with pytest.raises(DamagedIndex, match="make it again with `m3i shards index`") as caught:
        list(stream.loader(start=0, micro_batch=3, workers=workers, end=6))
    assert str(caught.value).startswith(str(path))
    assert exit_code(caught.value) == 2


@pytest.mark.parametrize(
    "notes",
    [[], 3, {"classes": []}, {"classes": {"dog": "x"}}, {"largest_category": "x"}],
    ids=str,
)
def test_notes_that_are_none(path: Path, notes: Any):
    rewritten(path, notes=notes or [0])
    with pytest.raises(DamagedIndex):
        Index(str(path))


def test_a_summary_with_another_count_would_shift_every_sample(path: Path):
    content = path.read_bytes()
    at = content.rindex(b"summary") + 200
    for changed in (b"A", b"B"):
        path.write_bytes(content[:at] + changed + content[at + 1 :])
        if path.read_bytes() == content:
            continue
        with pytest.raises(DamagedIndex):
            Index(str(path))


def test_a_page_with_another_byte(path: Path):
    content = bytearray(path.read_bytes())
    columns = pq.read_metadata(path).row_group(0)
    chunks = map(columns.column, range(columns.num_columns))
    chunk = next(c for c in chunks if c.path_in_schema.startswith("image_offset"))
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedIndex):
        Index(str(path)).members(0, 0, 6)


def test_an_index_without_checksums_is_read(path: Path):
    expected = Index(str(path)).members(0, 0, 6)
    table, footer = pq.read_table(path), dict(pq.read_metadata(path).metadata)
    kept = {key: footer[key] for key in (b"format", b"summary", b"notes")}
    pq.write_table(table.replace_schema_metadata(kept), path)
    assert (Index(str(path)).members(0, 0, 6) == expected).all()
