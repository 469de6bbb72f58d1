"""Rows of CSV, TSV, JSON lines and Parquet, and which columns hold pictures, captions, labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from m3i_scale.data import captions, labels
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.storage import StorageClient, is_local, local_path
from m3i_scale.data.text import read_text

ENDINGS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
BYTES_COLUMNS = ("jpg", "image", "bytes", "image_bytes", "jpeg", "png", "webp", "img", "picture")
PATH_COLUMNS = (
    *("file_name", "path", "image", "file", "filename", "filepath", "file_path", "image_path"),
    *("image_file", "image_name", "img", "img_path", "jpg", "jpeg", "png", "webp", "picture"),
)
URL_COLUMNS = ("url", "image_url", "img_url")


@dataclass(frozen=True)
class Columns:
    """Columns that a user has named; None: well-known names are looked for."""

    image: str | None = None
    text: str | None = None
    category: str | None = None


class Row(NamedTuple):
    """One row; `group` and `row` say where a Parquet file has it, else they are -1."""

    group: int
    row: int
    values: dict[str, Any]  # by column; of columns of bytes None


class Table(NamedTuple):
    """A table whose rows come one after the other."""

    columns: list[str]
    heavy: list[str]  # columns of bytes (or, as in Hugging Face's tables, of {bytes, path})
    rows: Iterator[Row]


class Chosen(NamedTuple):
    """The columns of a table that count."""

    image: str
    text: str | None
    category: str | None
    in_table: bool  # whether `image` holds the bytes


def open_table(path: str) -> Table:
    """Open a table by its ending.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    if path.endswith(".parquet"):
        return _open_parquet(path)
    with StorageClient().open(path) as file:
        data = file.read()
    try:
        text = read_text(data)
        return _json_lines(text) if path.endswith((".jsonl", ".ndjson")) else _csv(path, text)
    except (BadSample, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table that can be read: {error}") from None


def choose_columns(path: str, table: Table, named: Columns) -> Chosen:
    """The columns that hold picture, caption and label: the ones named, else well-known ones.

    Bytes in the table go before paths, and paths before URLs.

    Raises:
        ValueError: a named column is not there, or none holds pictures.
    """
    if not table.columns:
        raise ValueError(f"{path} is empty")
    heavy = [name for name in table.columns if name in table.heavy]
    others = [name for name in table.columns if name not in table.heavy]
    image = (
        _find(table.columns, named.image, ())
        or _find(heavy, None, BYTES_COLUMNS)
        or _find(others, None, PATH_COLUMNS)
        or (heavy[0] if len(heavy) == 1 else None)
        or _find(others, None, URL_COLUMNS)
    )
    if image is None:
        raise ValueError(
            f"{path} has the columns {table.columns}: name the one that holds the images' paths or "
            "bytes with --image-column (or call it image, path, file_name, jpg or url)"
        )
    rest = [name for name in table.columns if name != image]
    text = _find(rest, named.text, captions.FIELDS)
    return Chosen(image, text, _find(rest, named.category, labels.FIELDS), image in table.heavy)


def _find(columns: Sequence[str], named: str | None, known: Sequence[str]) -> str | None:
    if named is not None:
        if named not in columns:
            raise ValueError(f"there is no column {named!r}: the table has {list(columns)}")
        return named
    spelt = {column.casefold(): column for column in reversed(columns)}
    return next((spelt[name] for name in known if name in spelt), None)


def _csv(path: str, text: str) -> Table:
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.endswith(".tsv") else ","
    )
    rows = [{k: v for k, v in row.items() if k is not None} for row in reader]
    columns = [name for name in reader.fieldnames or [] if name is not None]
    return Table(columns, [], (Row(-1, -1, row) for row in rows))


def _json_lines(text: str) -> Table:
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is a {type(row).__name__}, not an object")
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return Table(list(columns), [], (Row(-1, -1, row) for row in rows))


def _open_parquet(path: str) -> Table:
    with parquet_errors(path):
        file = parquet_file(path)
    fields = list(file.schema_arrow)
    heavy = [field.name for field in fields if _holds_bytes(field.type)]
    light = [field.name for field in fields if field.name not in heavy]
    blank = dict.fromkeys(heavy)

    def rows() -> Iterator[Row]:
        for group in range(file.num_row_groups):
            with parquet_errors(path):
                values = (
                    file.read_row_group(group, columns=light).to_pylist()
                    if light
                    else [{}] * file.metadata.row_group(group).num_rows
                )
            for row, value in enumerate(values):
                yield Row(group, row, {**value, **blank})

    return Table([field.name for field in fields], heavy, rows())


def parquet_file(path: str) -> pq.ParquetFile:
    """Open a Parquet file behind a path or URL."""
    return pq.ParquetFile(local_path(path) if is_local(path) else StorageClient().open(path))


@contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turn what Arrow raises about a damaged file into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not Parquet that can be read ({reason}): fetch it again"
        ) from None


def _holds_bytes(kind: Any) -> bool:
    return str(kind).startswith(("binary", "large_binary", "fixed_size_binary", "struct<bytes"))
