"""Listing what a new set of shards is to be made of, without reading any image."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from m3i_scale.data import decode
from m3i_scale.data.decode import BadSample
from m3i_scale.data.storage import Storage, join, parent
from m3i_scale.shards.scan import CATEGORY, IMAGE, TEXT, Group, find_groups

_EXTENSIONS = tuple(f".{name}" for name in IMAGE)
PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "url")
BYTES_COLUMNS = ("bytes", "image_bytes", "jpg", "image")
TEXT_COLUMNS = ("caption", "text", "title", "txt")
CATEGORY_COLUMNS = ("category", "label", "class", "cls")


@dataclass(frozen=True)
class Record:
    """Where one sample comes from: a file, a byte range of an archive, or a row of a table."""

    url: str
    offset: int = 0
    size: int = 0  # bytes of the image, 0 where that is not known before reading
    group: int = -1  # row group and row of the Parquet table `url` whose `column` has the bytes
    row: int = -1
    column: str = ""
    text: str | None = None
    category: int | None = None


@dataclass(frozen=True)
class Listing:
    """The records of a source, the names of its categories if any, and what was left out."""

    records: list[Record]
    classes: list[str]
    left_out: dict[str, int]  # samples that lack what the others have, by what they lack


def list_records(
    source: str, text_column: str | None = None, category_column: str | None = None
) -> Listing:
    """List the samples of an image folder, a table, or tar or zip archives (path or glob).

    What most samples have is what the source has: the few without it are left out and counted.
    Raises ValueError where there is no sample, or where fewer than half would remain.
    """
    path = Path(source)
    if path.is_dir():
        found = _named(_from_folder(path))
    elif source.endswith((".csv", ".tsv", ".parquet")):
        found = _named(_from_table(source, text_column, category_column))
    else:
        archives = Storage().glob(source)
        if not archives:
            raise ValueError(f"{source} is neither a folder, a table nor a glob of archives")
        found = _named(item for archive in archives for item in _from_archive(archive))
    return _complete(source, found)


def _complete(source: str, found: Listing) -> Listing:
    """Leave out the samples that lack the caption or the category that others have."""
    if not found.records:
        raise ValueError(f"there is no image in {source}")
    labels = {"caption": "text", "category": "category"}
    wanted = {
        label: field
        for label, field in labels.items()
        if any(getattr(record, field) is not None for record in found.records)
    }
    if not wanted:
        raise ValueError(
            f"the images of {source} have neither captions nor categories: put them in one folder "
            "per category, a .txt beside each, or name the columns"
        )
    kept, left_out, odd = list[Record](), Counter[str](), ""
    for record in found.records:
        lacking = [label for label, field in wanted.items() if getattr(record, field) is None]
        if lacking:
            left_out[f"no {' and no '.join(lacking)}"] += 1
            odd = odd or record.url
        else:
            kept.append(record)
    if 2 * len(kept) <= len(found.records):
        raise ValueError(
            f"only {len(kept)} of {len(found.records)} images of {source} have a "
            f"{' and a '.join(wanted)}; {odd} has not: add what is missing, or build from the "
            "others alone"
        )
    return Listing(kept, found.classes, dict(left_out))


def _named(items: Iterator[tuple[Record, str | int | None]]) -> Listing:
    """Number the categories: integers stay, names are numbered in sorted order."""
    pairs = list(items)
    names = sorted({category for _, category in pairs if isinstance(category, str)})
    number = {name: i for i, name in enumerate(names)}
    records = []
    for record, category in pairs:
        index = number[category] if isinstance(category, str) else category
        records.append(Record(**{**vars(record), "category": index}))
    return Listing(records, names, {})


def _from_folder(folder: Path) -> Iterator[tuple[Record, str | None]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _EXTENSIONS or not path.is_file():
            continue
        caption = path.with_suffix(".txt")
        text = _caption(caption.read_bytes()) if caption.exists() else None
        inside = path.parent.relative_to(folder).as_posix()
        size = path.stat().st_size
        yield Record(str(path), size=size, text=text), None if inside == "." else inside


def _caption(data: bytes) -> str | None:
    try:
        return decode.decode_text(data, "txt")[0]
    except BadSample:
        return None


def _from_table(
    source: str, text_column: str | None, category_column: str | None
) -> Iterator[tuple[Record, str | int | None]]:
    rows = _parquet_rows(source) if source.endswith(".parquet") else _csv_rows(source)
    columns, values = rows
    text = _column(columns, text_column, TEXT_COLUMNS)
    category = _column(columns, category_column, CATEGORY_COLUMNS)
    image = _column(columns, None, PATH_COLUMNS + BYTES_COLUMNS)
    if image is None:
        raise ValueError(
            f"{source} has the columns {columns}: one of {PATH_COLUMNS + BYTES_COLUMNS} must hold "
            "the images' paths or bytes"
        )
    for group, row, value in values:
        caption = _caption(str(value[text]).encode()) if text and value[text] is not None else None
        label = value[category] if category else None
        where = value[image]
        if isinstance(where, str) or group < 0:  # a row of a CSV may be too short
            yield Record(join(parent(source), where or ""), text=caption), _label(label)
        else:
            yield Record(source, group=group, row=row, column=image, text=caption), _label(label)


def _label(value: Any) -> str | int | None:
    """A category in a table: tables with gaps hold integers as floats, and NaN or ""."""
    if value is None or value != value or value == "":
        return None
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else value
    return int(value) if float(value).is_integer() else str(value)


def _column(columns: Sequence[str], chosen: str | None, known: tuple[str, ...]) -> str | None:
    if chosen is not None and chosen not in columns:
        raise ValueError(f"there is no column {chosen!r}: the table has {list(columns)}")
    return chosen or next((name for name in known if name in columns), None)


Rows = Iterator[tuple[int, int, dict[str, Any]]]  # (row group, row in it, values by column)


def _csv_rows(source: str) -> tuple[list[str], Rows]:
    with open(source, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            table = list(csv.DictReader(file, delimiter="\t" if source.endswith(".tsv") else ","))
        except csv.Error as error:
            raise ValueError(f"{source} is not a table that can be read: {error}") from None
    columns = list(table[0]) if table else []
    return columns, ((-1, -1, row) for row in table)


def _parquet_rows(source: str) -> tuple[list[str], Rows]:
    """Rows without the images: columns of bytes, or of structs of them, come back as None."""
    file = pq.ParquetFile(source)
    light = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
    heavy = {field.name: None for field in file.schema_arrow if field.name not in light}

    def rows() -> Rows:
        for group in range(file.num_row_groups):
            table = (
                file.read_row_group(group, columns=light).to_pylist()
                if light
                else [{}] * (file.metadata.row_group(group).num_rows)
            )
            for row, values in enumerate(table):
                yield group, row, {**values, **heavy}

    return [field.name for field in file.schema_arrow], rows()


def _holds_bytes(kind: Any) -> bool:
    """Whether a column is bytes or, as in Hugging Face's tables, struct<bytes, path>."""
    return str(kind).startswith(("binary", "large_binary", "struct<bytes"))


def _from_archive(archive: str) -> Iterator[tuple[Record, str | int | None]]:
    if archive.endswith(".zip"):
        yield from _from_zip(archive)
        return
    storage = Storage()
    with storage.open(archive) as file:
        for group in find_groups(file, storage.size(archive)):
            image = group.image()
            if image is None:
                continue
            caption = _member(file, group, TEXT)
            label = _member(file, group, CATEGORY)
            text = _caption(caption) if caption is not None else None
            # Archives without captions and labels hold one category each, as ImageNet's do.
            alone = None if caption is not None else Path(archive).stem
            category = int(label) if label is not None and label.strip().isdigit() else alone
            yield Record(archive, image.offset, image.size, text=text), category


def _member(file: Any, group: Group, kinds: tuple[str, ...]) -> bytes | None:
    for kind in kinds:
        if kind in group.members:
            member = group.members[kind]
            file.seek(member.offset)
            return bytes(file.read(min(member.size, decode.MAX_TEXT_BYTES)))
    return None


def _from_zip(archive: str) -> Iterator[tuple[Record, str | None]]:
    import zipfile

    with zipfile.ZipFile(archive) as file:
        names = {info.filename: info.file_size for info in file.infolist()}
        for name, size in sorted(names.items()):
            if not name.lower().endswith(_EXTENSIONS):
                continue
            caption = f"{name.rsplit('.', 1)[0]}.txt"
            text = _caption(file.read(caption)) if caption in names else None
            folder = name.rsplit("/", 1)[0] if "/" in name else None
            yield Record(f"zip://{name}::{archive}", size=size, text=text), folder
