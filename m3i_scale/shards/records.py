"""Listing what a new set of shards is to be made of, without reading any image."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from m3i_scale.data import labels
from m3i_scale.data.storage import StorageClient, join, parent
from m3i_scale.shards import scan, tables
from m3i_scale.shards.annotations import Annotation, annotate, of_values
from m3i_scale.shards.groups import IMAGE, Group, Member, gather, is_hidden
from m3i_scale.shards.sources import find_files, missing
from m3i_scale.shards.tables import Columns

_EXTENSIONS = tuple(f".{name}" for name in IMAGE)
_ARCHIVES = (".tar", ".zip")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # Hugging Face's ImageFolder


@dataclass(frozen=True)
class Record:
    """Where one sample comes from: a file, a byte range of an archive, or a row of a table."""

    url: str
    offset: int = 0
    size: int = 0  # bytes of the image, 0 where that is not known before reading
    group: int = -1  # row group and row of the Parquet table `url` whose `column` has the bytes
    row: int = -1
    column: str = ""  # of the table, or the member of the zip `url`
    texts: tuple[str, ...] = ()
    category: int | None = None

    @property
    def text(self) -> str | None:
        """The caption; the others, if any, follow it in `texts`."""
        return self.texts[0] if self.texts else None

    @property
    def place(self) -> str:
        """The sample as messages name it."""
        if self.row >= 0:
            return f"{self.url}, row {self.row} of row group {self.group}"
        inside = self.column or (f"byte {self.offset}" if self.offset else "")
        return f"{self.url}, {inside}" if inside else self.url


@dataclass(frozen=True)
class Listing:
    """The records of a source, the numbers of its class names if any, and what was left out."""

    records: list[Record]
    classes: dict[str, int]
    left_out: dict[str, int]  # samples that lack what the others have, by what they lack
    examples: dict[str, str] = field(default_factory=dict)  # one for each cause
    notes: list[str] = field(default_factory=list)  # what was not taken, and why


@dataclass
class _Found:
    record: Record
    annotation: Annotation
    place: str | None = None  # folder or archive, a label if there is nothing better


def list_records(
    source: str, columns: Columns | None = None, classes: Mapping[str, int] | None = None
) -> Listing:
    """List the samples of a folder of images, of tables, or of tar or zip archives.

    What most samples have is what the source has: the few without it are left out and counted.

    Args:
        source: a folder, or a path, glob or braces of tables and archives (sources.find_files).
        columns: the columns of tables that count.
        classes: the class list, if the numbers of class names are settled.

    Raises:
        ValueError: there is no sample, fewer than half would remain, or a file cannot be read.
    """
    columns = columns or Columns()
    if Path(source).is_dir():
        found = list(_from_folder(source, columns))
        if not found:
            found = list(_from_files(_files(source), columns))
    else:
        found = list(_from_files(_files(source), columns))
    if not found:
        raise ValueError(f"there is no image in {source}")
    return _complete(source, found, columns, classes)


def _files(source: str) -> list[str]:
    endings = (*_ARCHIVES, *tables.ENDINGS)
    try:
        files = find_files([source], endings, StorageClient())
    except ValueError as error:
        where = Path(source)
        what = "there is no image" if where.is_dir() else f"{source} is neither a folder"
        raise ValueError(f"{what}, a table nor a glob of archives: {error}") from None
    for file in files:
        if not file.endswith(endings):
            known = ", ".join(endings)
            raise ValueError(
                f"{file} is neither a folder, a table nor a glob of archives ({known})"
            )
    return files


def _from_files(files: Iterable[str], columns: Columns) -> Iterator[_Found]:
    for file in files:
        try:
            if file.endswith(".zip"):
                yield from _from_zip(file)
            elif file.endswith(".tar"):
                yield from _from_tar(file)
            else:
                yield from _from_table(file, columns)
        except FileNotFoundError:
            raise ValueError(f"there is no file {file}: {missing(file)}") from None


# ------------------------------------------------------------------------------- kinds of sources


def _from_folder(folder: str, columns: Columns) -> Iterator[_Found]:
    listed = set[str]()  # the images that tables of metadata speak of
    tabled = False
    for path, names in _walk(folder, ()):
        for name in _METADATA:
            if name in names:
                for found in _from_table(os.path.join(path, name), columns):
                    listed.add(os.path.normpath(found.record.url))
                    yield found
                tabled = True
        inside = Path(path).relative_to(folder).as_posix()
        for group in _by_stem(names):
            image = group.image()
            assert image is not None
            url = os.path.join(path, image.name)
            if os.path.normpath(url) in listed:
                continue
            record = Record(url, size=_size(url))
            if tabled:
                yield _Found(record, Annotation())
            else:
                found_here = annotate(group, _reader(path, group))
                yield _Found(record, found_here, None if inside == "." else inside)


def _size(path: str) -> int:
    """Bytes of a file; 0 for a link that is_main nowhere, which the build will count."""
    return os.stat(path).st_size if os.path.exists(path) else 0


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """(path, names of the files in it) of a folder and all below it; links are followed."""
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in above:
        return  # a link to a folder above
    files, folders = list[str](), list[str]()
    for name in sorted(os.listdir(folder)):
        if not is_hidden(name):
            (folders if os.path.isdir(os.path.join(folder, name)) else files).append(name)
    yield folder, files
    for name in folders:
        yield from _walk(os.path.join(folder, name), (*above, (here.st_dev, here.st_ino)))


def _by_stem(names: Iterable[str]) -> list[Group]:
    """One group for every image among `names`, with the files that differ in the ending alone."""
    stems: dict[str, dict[str, Member]] = {}
    for name in names:
        stem, _, kind = name.rpartition(".")
        if stem:
            stems.setdefault(stem, {}).setdefault(kind.lower(), Member(name, 0, 0))
    groups = []
    for stem, members in stems.items():
        images = [kind for kind in IMAGE if kind in members]
        others = {kind: member for kind, member in members.items() if kind not in images}
        groups += [Group(stem, {kind: members[kind], **others}) for kind in images]
    return groups


def _reader(folder: str, group: Group) -> Any:
    return lambda kind: Path(folder, group.members[kind].name).read_bytes()


def _from_table(source: str, columns: Columns) -> Iterator[_Found]:
    table = tables.open_table(source)
    chosen = tables.choose_columns(source, table, columns)
    for group, row, values in table.rows:
        annotation = of_values(
            values.get(chosen.text) if chosen.text else None,
            values.get(chosen.category) if chosen.category else None,
        )
        if chosen.in_table:
            yield _Found(Record(source, group=group, row=row, column=chosen.image), annotation)
        else:
            where = values.get(chosen.image)
            url = join(parent(source), str(where)) if where else ""
            yield _Found(Record(url), annotation)


def _from_tar(archive: str) -> Iterator[_Found]:
    storage = StorageClient()
    with storage.open(archive) as file:
        for group in gather(scan.find_groups(file, storage.size(archive), scan.KEPT)):
            image = group.image()
            if image is not None and group.key:
                record = Record(archive, image.offset, image.size)
                annotation = annotate(group, _tar_reader(file, group))
                yield _Found(record, annotation, Path(archive).stem)


def _tar_reader(file: IO[bytes], group: Group) -> Any:
    return lambda kind: scan.content(file, group.members[kind])


def _from_zip(archive: str) -> Iterator[_Found]:
    file = open_zip(archive)
    sizes = {info.filename: info.file_size for info in file.infolist() if not info.is_dir()}
    for folder in sorted({name.rpartition("/")[0] for name in sizes}):
        start = f"{folder}/" if folder else ""
        if is_hidden(folder):
            continue
        names = [n[len(start) :] for n in sizes if n.rpartition("/")[0] == folder]
        for group in _by_stem(sorted(name for name in names if not is_hidden(name))):
            image = group.image()
            assert image is not None
            name = start + image.name
            annotation = annotate(group, _zip_reader(archive, start, group))
            yield _Found(Record(archive, size=sizes[name], column=name), annotation, folder or None)


def _zip_reader(archive: str, start: str, group: Group) -> Any:
    return lambda kind: read_zip(archive, start + group.members[kind].name)


def open_zip(archive: str) -> zipfile.ZipFile:
    """Open a zip, local or remote, once per process; ValueError where it is none."""
    return _open_zip(archive, os.getpid())  # forked processes must not share a file's position


@lru_cache(maxsize=4)
def _open_zip(archive: str, _: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(StorageClient().open(archive))
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{archive} is not a zip that can be read ({error}): fetch it again"
        ) from None


def read_zip(archive: str, name: str) -> bytes:
    """One member of a zip; OSError where it is damaged, encrypted or packed in an unknown way."""
    try:
        return open_zip(archive).read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise OSError(f"{archive}, {name}: {error}") from None


# --------------------------------------------------------------- what the source as a whole offers


def _complete(
    source: str, found: list[_Found], columns: Columns, classes: Mapping[str, int] | None
) -> Listing:
    """Number the labels; leave out samples that lack the caption or the label that most have."""
    notes = _take_places(found)
    numbers = dict(classes or labels.number_names(item.annotation.label for item in found))
    records = [_record(item, numbers) for item in found]
    counts = {
        "caption": sum(record.text is not None for record in records),
        "category": sum(record.category is not None for record in records),
    }
    named = {"caption": columns.text, "category": columns.category}
    wanted = [
        what
        for what, count in counts.items()
        if count and (named[what] or 2 * count > len(records) or count == max(counts.values()))
    ]
    if not wanted:
        raise ValueError(
            f"the images of {source} have neither captions nor categories: put them in one folder "
            "per category, a .txt beside each, or name the columns; where no target needs "
            "either, one folder for all of them will do, as kind: category"
        )
    for what in counts.keys() - set(wanted):
        if counts[what]:
            notes.append(
                f"no {what} was taken: only {counts[what]:,} of {len(records):,} images have one"
            )
    kept, left_out, examples = list[Record](), Counter[str](), dict[str, str]()
    for item, record in zip(found, records, strict=True):
        cause = _lack(item, record, wanted)
        if cause:
            left_out[cause] += 1
            examples.setdefault(cause, record.place)
        else:
            texts = record.texts if "caption" in wanted else ()
            category = record.category if "category" in wanted else None
            kept.append(replace(record, texts=texts, category=category))
    if 2 * len(kept) <= len(found):
        raise ValueError(
            f"only {len(kept)} of {len(found)} images of {source} have a "
            f"{' and a '.join(wanted)}; {next(iter(examples.values()))} has not: add what is "
            "missing, or build from the others alone"
        )
    used = {} if "category" not in wanted else numbers
    return Listing(kept, used, dict(left_out), examples, notes)


def _take_places(found: list[_Found]) -> list[str]:
    """Make folder and archive names labels where they are meant so; return what was not taken."""
    places = {item.place for item in found if item.place}
    texts = 2 * sum(bool(item.annotation.texts) for item in found) > len(found)
    if not places or any(item.annotation.label is not None for item in found):
        return []
    archives = any(item.place and item.record.url.endswith(".tar") for item in found)
    numbered = all(place.replace("/", "").isdigit() for place in places)
    if texts and (archives or numbered or len(places) == 1):
        # img2dataset's folders 00000, 00001, ... and archives of pairs are no classes.
        what = "archives" if archives else "folders"
        return [] if archives else [f"names of {what} were not taken as categories beside captions"]
    for item in found:
        if item.place:
            item.annotation.label = labels.folder_label(item.place)
    return []


def _record(item: _Found, numbers: Mapping[str, int]) -> Record:
    try:
        category = labels.category_of(item.annotation.label, numbers)
    except ValueError:
        category, item.annotation.problem = None, "class not in the class list"
    return replace(item.record, texts=tuple(item.annotation.texts), category=category)


def _lack(item: _Found, record: Record, wanted: list[str]) -> str:
    """Why a sample is left out, or ""."""
    if not record.url:
        return "no image"
    has = {"caption": record.text, "category": record.category}
    lacking = [what for what in wanted if has[what] is None]
    if not lacking:
        return ""
    return item.annotation.problem or f"no {' and no '.join(lacking)}"
