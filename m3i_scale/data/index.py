"""The index of one source: a Parquet file with one row per shard.

| column          | type                | meaning                                                  |
| --------------- | ------------------- | -------------------------------------------------------- |
| shard           | string              | URL, or path relative to the index file                  |
| bytes           | int64               | length of the shard                                      |
| samples         | int32               | usable samples                                           |
| image_offset    | list<int64>         | per sample: offset of the image member's data            |
| image_size      | list<int32>         | per sample: its length in bytes                          |
| text_offset     | list<int64>         | of the caption member, empty list where not indexed      |
| text_size       | list<int32>         |                                                          |
| more_offset     | list<int64>         | of further captions, as many of each sample; -1: none    |
| more_size       | list<int32>         |                                                          |
| category_offset | list<int64>         | of the category member, likewise                         |
| category_size   | list<int32>         |                                                          |
| check           | list<uint32>        | CRC-32 of the tar headers of these members (`check_of`)  |
| text_member     | string              | `txt`, `json:caption`, ...; of several a JSON list       |
| category_member | string              | e.g. `cls`, or `json:label`                              |
| problems        | list<struct<key, cause>> | samples of the shard that are left out, and why     |

A shard that is changed after it was indexed shows in its headers: `check` covers the name, size and
kind of every member that a sample uses.  Indexes of format 2 lack that column; of theirs the sizes
are compared alone.  Format 4 is format 3 with several captions of a sample (`places`).

Row groups hold about 64k samples, so that one look-up decodes about a megabyte.  The short columns
of all rows are repeated in the footer (key `summary`), so that an index of 45,000 shards opens in a
fraction of a second.  The footer's key `notes` holds the class list and the largest category.

Nothing in an index is believed that could shift the order or fill the memory: `summary` and `notes`
have a checksum in the footer (key `check`), every page has one, and of each sample that is looked
up offsets and sizes must lie within its shard.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from tarfile import BLOCKSIZE as BLOCK
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3i_scale.config import SourceKind
from m3i_scale.data.bad_sample import OfOneRank
from m3i_scale.data.members import kinds_of, names_several, read_places, require_within
from m3i_scale.data.retry import PERMANENT, StorageError
from m3i_scale.data.storage import StorageClient, is_local, join, local_path, parent

FORMAT = "m3i-index-3"
_SEVERAL = "m3i-index-4"  # with several captions of a sample
_READABLE = {FORMAT, _SEVERAL, "m3i-index-2"}  # 2: without `check` and `fingerprint`
_GROUP_SAMPLES = 65_536
_LISTS = (
    "image_offset",
    "image_size",
    "text_offset",
    "text_size",
    "category_offset",
    "category_size",
)
_MORE = ("more_offset", "more_size")
_SUMMARY = ("shard", "bytes", "samples", "text_member", "category_member")
# Name, size, kind and leading folders in a tar header: what must stay the same.  Owner and times
# may change: a copy of a shard is as good as the shard.
_IDENTITY = (slice(0, 100), slice(124, 136), slice(156, 157), slice(345, 500))
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("bytes", pa.int64()),
        ("samples", pa.int32()),
        *(
            (name, pa.list_(pa.int64() if name.endswith("offset") else pa.int32()))
            for name in (*_LISTS, *_MORE)
        ),
        ("check", pa.list_(pa.uint32())),
        ("text_member", pa.string()),
        ("category_member", pa.string()),
        ("problems", pa.list_(pa.struct([("key", pa.string()), ("cause", pa.string())]))),
    ]
)


class DamagedIndex(OfOneRank, ValueError):  # noqa: N818  (a finding about data)
    """An index is not what was written, or says what cannot be."""


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn whatever a damaged index makes its readers raise into one sentence.

    Raises:
        DamagedIndex: in the place of those. What the storage raises passes.
    """
    try:
        yield
    except DamagedIndex:
        raise
    except _OF_DAMAGE as error:
        of_storage = isinstance(error, (StorageError, *PERMANENT))
        if of_storage or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedIndex(f"{path} is damaged ({reason}): {_REMEDY}") from None


_REMEDY = "copy it again, or make it again with `m3i shards index`"
_OF_DAMAGE = (
    pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    RecursionError,
)  # fmt: skip


def header_identity(block: bytes) -> bytes:
    """The part of a tar header of 512 bytes that tells which member follows."""
    return b"".join(block[part] for part in _IDENTITY)


def check_of(identities: Iterable[bytes]) -> int:
    """Checksum over the `header_identity` of image, caption, category and further captions."""
    return zlib.crc32(b"".join(identities))


@dataclass
class ShardIndex:
    """One row of the index; the lists run over the usable samples in the order of the tar."""

    shard: str
    bytes: int
    image_offset: list[int] = field(default_factory=list)
    image_size: list[int] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    text_size: list[int] = field(default_factory=list)
    category_offset: list[int] = field(default_factory=list)
    category_size: list[int] = field(default_factory=list)
    more_offset: list[int] = field(default_factory=list)
    more_size: list[int] = field(default_factory=list)
    check: list[int] = field(default_factory=list)
    text_member: str | None = None  # by `spell_places`
    category_member: str | None = None
    problems: list[dict[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of usable samples."""
        return len(self.image_offset)

    def table(self) -> pa.Table:
        """The row as a table."""
        return pa.table({name: [getattr(self, name)] for name in SCHEMA.names}, schema=SCHEMA)


def write_index(
    path: str, rows: Iterable[pa.Table], notes: Mapping[str, Any] | None = None
) -> None:
    """Write tables of one row per shard (ShardIndex.table) to a local path, grouped by size.

    `notes` about all shards together are read when the last row is written: see Index.notes.
    """
    encoding = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in (*_LISTS, *_MORE)}
    several = False
    options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False,
               "write_page_checksum": True}  # fmt: skip
    summaries = []
    with pq.ParquetWriter(path, SCHEMA, column_encoding=encoding, **options) as writer:
        for number, group in enumerate(_groups(rows)):
            table = pa.concat_tables(group).cast(SCHEMA).combine_chunks()
            writer.write_table(table)
            several |= any(map(names_several, table.column("text_member").to_pylist()))
            added = {
                "group": pa.array([number] * len(group), pa.int32()),
                "row": pa.array(range(len(group)), pa.int32()),
                "fingerprint": pa.array(map(_fingerprint, table.column("check")), pa.uint32()),
            }
            summary = table.select(list(_SUMMARY))
            for name, values in added.items():
                summary = summary.append_column(name, values)
            summaries.append(summary)
        summary = pa.concat_tables(summaries).combine_chunks()
        footer = {
            "format": _SEVERAL if several else FORMAT,
            "summary": _pack(summary),
            "notes": json.dumps(notes or {}),
        }
        footer["check"] = _footer_check(footer)
        writer.add_key_value_metadata(footer)


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that `write_index` put in the footer of a local file."""
    notes: dict[str, Any] = json.loads(pq.read_metadata(path).metadata.get(b"notes", b"{}"))
    return notes


def _footer_check(footer: Mapping[str, str]) -> str:
    return f"{zlib.crc32((footer['summary'] + footer['notes']).encode()):08x}"


def _fingerprint(check: pa.ListScalar) -> int:
    return zlib.crc32(check.values.to_numpy().tobytes()) if check.values is not None else 0


def _pack(table: pa.Table) -> str:
    """A table as text: Arrow's stream format, zstd, base64."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return base64.b64encode(sink.getvalue()).decode()


def _unpack(text: bytes) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(text)).read_all()


def _groups(rows: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    group: list[pa.Table] = []
    held = 0
    for row in rows:
        samples = int(row.column("samples")[0].as_py())
        if group and held + samples > _GROUP_SAMPLES:
            yield group
            group, held = [], 0
        group.append(row)
        held += samples
    if group:
        yield group


class Index:
    """Read access to an index file: a small summary in memory, offsets on demand.

        index = Index("data/text.parquet")
        index.samples, index.url(0), index.members(0, 10, 20)  # (10, 7)

    Can be handed to forked or spawned workers; each opens the file for itself.
    """

    def __init__(self, path: str, storage: StorageClient | None = None) -> None:
        self._storage = storage or StorageClient()
        self.path = self._storage.check(str(path))
        self._base = parent(self.path)
        self._file: pq.ParquetFile | None = None
        self._owner = 0
        self._metadata: pq.FileMetaData | None = None
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        with damage_named(self.path):
            self._read_footer()

    def _read_footer(self) -> None:
        """The summary and the notes.

        Raises:
            one of _OF_DAMAGE: something is missing, of another type, or contradicts the rest.
        """
        footer = {key.decode(): value.decode()
                  for key, value in self._open().metadata.metadata.items()}  # fmt: skip
        if "check" in footer and footer["check"] != _footer_check(footer):
            raise ValueError("its summary does not match its checksum")
        table = _unpack(footer["summary"].encode())
        if any(table.column(name).null_count for name in ("shard", "samples", "bytes")):
            raise ValueError("its summary has gaps")
        self.shards: list[str] = table.column("shard").to_pylist()
        self.counts: NDArray[np.int64] = table.column("samples").to_numpy().astype(np.int64)
        self.shard_bytes: NDArray[np.int64] = table.column("bytes").to_numpy()
        self.text_member: list[str | None] = table.column("text_member").to_pylist()
        self.category_member: list[str | None] = table.column("category_member").to_pylist()
        known = "fingerprint" in table.column_names
        self._fingerprint = table.column("fingerprint").to_numpy() if known else None
        several = footer.get("format") == _SEVERAL
        self.places = [read_places(member, several) for member in self.text_member]
        # Further members with captions, of the shard that has most.
        self.more = max((len(kinds_of(places)) - 1 for places in self.places if places), default=0)
        self._columns = [*_LISTS, "check"] if known else list(_LISTS)
        self._where = np.stack([table.column(c).to_numpy() for c in ("group", "row")], axis=1)
        self.samples = int(self.counts.sum())
        # About all shards together: classes (numbers of the labels that are names) and
        # largest_category.
        self.notes: dict[str, Any] = json.loads(footer.get("notes", "{}"))
        self.classes: dict[str, int] = self.notes.get("classes", {})
        _require_sound(self)

    @property
    def kind(self) -> SourceKind | None:
        """What every usable sample has: "text", "category" or "both"; None without samples."""
        used = np.flatnonzero(self.counts).tolist()
        text = bool(used) and all(self.text_member[shard] for shard in used)
        category = bool(used) and all(self.category_member[shard] for shard in used)
        return "both" if text and category else "text" if text else "category" if category else None

    @property
    def largest_category(self) -> int | None:
        """The largest category of any sample; None without categories, or in an older index."""
        found = int(self.notes.get("largest_category", -1))
        return found if found >= 0 else None

    def url(self, shard: int) -> str:
        """URL of a shard."""
        return join(self._base, self.shards[shard])

    @property
    def checked(self) -> bool:
        """Whether the index knows the headers of its members (format 3), not their sizes alone."""
        return self._fingerprint is not None

    def fingerprint(self) -> str:
        """A hash of what the order rests on: shards' names without folders, lengths, counts."""
        rows = zip(
            (name.rpartition("/")[2] for name in self.shards),
            self.shard_bytes.tolist(),
            self.counts.tolist(),
            self.text_member,
            self.category_member,
            strict=True,
        )
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def version(self, shard: int) -> str:
        """What tells the indexed version of a shard from others: its length and its headers."""
        known = 0 if self._fingerprint is None else int(self._fingerprint[shard])
        return f"{int(self.shard_bytes[shard])}-{known:08x}"

    def members(self, shard: int, start: int, stop: int) -> NDArray[np.int64]:
        """Offset and size of image, caption and category, and check, of samples
        [start, stop), and offset and size of each of `more` captions: int64 (n, 7 + 2 * more).

        -1 where a member is not part of the source or the sample, or the index has no checks.
        """
        group, row = self._where[shard].tolist()
        members = np.full((stop - start, 7 + 2 * self.more), -1, dtype=np.int64)
        with damage_named(self.path):
            table = self._group(group)
            self._add_more(members, table, row, shard, start, stop)
            for column, name in enumerate(self._columns):
                found = _slice(table.column(name), row, start, stop)
                if len(found) != stop - start:
                    raise ValueError(f"shard {self.shards[shard]} has not {stop} of {name}")
                members[:, column] = found
            if self.checked and (members[:, 6] < 0).any():
                raise ValueError(f"shard {self.shards[shard]} has no checksums")
            require_within(members, int(self.shard_bytes[shard]), self.shards[shard])
        return members

    def _add_more(
        self, members: NDArray[np.int64], table: pa.Table, row: int, shard: int, start: int,
        stop: int,
    ) -> None:  # fmt: skip
        """Fill in the columns of further captions."""
        count = len(kinds_of(self.places[shard])) - 1
        for column, name in enumerate(_MORE) if count > 0 else ():
            values = table.column(name)[row].values[count * start : count * stop].to_numpy()
            if len(values) != count * (stop - start):
                raise ValueError(f"shard {self.shards[shard]} has not {count * stop} of {name}")
            members[:, 7 + column : 7 + column + 2 * count : 2] = values.reshape(-1, count)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """(shard, key, cause) of every sample that was left out."""
        file = self._open()
        for group in range(file.num_row_groups):
            with damage_named(self.path):
                rows = file.read_row_group(
                    group, columns=["shard", "problems"], use_threads=False
                ).to_pylist()
            for row in rows:
                for problem in row["problems"]:
                    yield row["shard"], problem["key"], problem["cause"]

    def _group(self, group: int) -> pa.Table:
        if group not in self._groups:
            self._groups[group] = self._open().read_row_group(
                group, columns=[*self._columns, *(_MORE if self.more else ())], use_threads=False
            )
            while len(self._groups) > 4:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _open(self) -> pq.ParquetFile:
        """The open file of this process.

        Raises:
            ValueError: it is no index.
        """
        if self._file is None or self._owner != os.getpid():
            local = is_local(self.path)
            self._file = _parquet(
                self.path,
                local_path(self.path)
                if local
                else self._storage.open(self.path, buffer_bytes=1 << 16),
                self._metadata,
            )
            self._metadata = self._file.metadata  # a forked worker shares the parsed footer
            self._owner = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_metadata": None, "_groups": OrderedDict()}


def _parquet(url: str, source: Any, metadata: pq.FileMetaData | None) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(
            source, metadata=metadata, memory_map=isinstance(source, str),
            page_checksum_verification=True,
        )  # fmt: skip
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise DamagedIndex(
            f"{url} is not an index ({reason}): make one with `m3i shards index`"
        ) from None
    found = (file.metadata.metadata or {}).get(b"format", b"none").decode("utf-8", "replace")
    if found not in _READABLE:
        raise DamagedIndex(
            f"{url} is Parquet of format {found!r}, not {FORMAT!r}: make it with `m3i shards index`"
        )
    return file


def _require_sound(index: Index) -> None:
    """Raise ValueError unless an index's summary and notes can be true."""
    counts, sizes, where = index.counts, index.shard_bytes, index._where
    groups = [index._open().metadata.row_group(n).num_rows
              for n in range(index._open().num_row_groups)]  # fmt: skip
    if len(counts) and (counts.min() < 0 or sizes.min() < 0 or (counts * BLOCK > sizes).any()):
        raise ValueError("it has shards that are smaller than their samples")
    if any(not (0 <= g < len(groups) and 0 <= row < groups[g]) for g, row in where.tolist()):
        raise ValueError("its summary names rows that it does not have")
    for name, number in index.classes.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"the class {name!r} has the number {number!r}")
    index.largest_category  # noqa: B018  (raises)


def _slice(column: pa.ChunkedArray, row: int, start: int, stop: int) -> NDArray[np.int64]:
    values = column[row].values[start:stop].to_numpy().astype(np.int64)
    return values if len(values) else np.full(stop - start, -1, dtype=np.int64)
