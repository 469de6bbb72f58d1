"""Writing shards: from an image folder, from tables, or from existing archives.

1. list the records: where each image is, its caption, its category (records.py);
2. shuffle them with a seed and deal them to shards that are equal in count and, as far as sizes
   are known beforehand, in bytes;
3. write the shards in several processes (writing.py), each under a temporary name until it is
   complete, so that an interrupted build goes on where it stopped;
4. index the result.

A build that is run again writes the shards whose sources, captions, labels or options changed, and
leaves the others.  Because of step 2 neighbours in a shard are unrelated, whatever the order of the
source was.  Only images that lie inside a Parquet table stay together by row group, which is read
as a whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from tqdm import tqdm

from m3i_scale.config import SourceKind
from m3i_scale.data import labels
from m3i_scale.data.files import written
from m3i_scale.data.order import hash64
from m3i_scale.data.storage import is_local
from m3i_scale.shards.indexing import IndexSummary, describe_problems, index_shards
from m3i_scale.shards.records import Listing, Record, list_records
from m3i_scale.shards.sources import check_name
from m3i_scale.shards.tables import Columns
from m3i_scale.shards.workers import process_map
from m3i_scale.shards.writing import FORMAT, Recipe, Report, write_shard

__all__ = ["BuildSummary", "Recipe", "build_shards", "deal"]

_UNKNOWN_BYTES = 100_000  # what an image is taken to weigh where its size is not known beforehand


@dataclass(frozen=True)
class BuildSummary:
    """What a build wrote and what it left out, by cause."""

    index: IndexSummary
    left_out: dict[str, int]
    examples: dict[str, str] = field(default_factory=dict)  # by cause
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        causes = describe_problems(self.left_out, self.examples, "not written")
        return "\n".join([str(self.index), *causes, *(f"  {note}" for note in self.notes)])


def build_shards(
    source: str,
    folder: str | Path,
    *,
    shard_samples: int = 10_000,
    shard_bytes: int = 1 << 30,
    recipe: Recipe | None = None,
    seed: int = 0,
    processes: int = 1,
    image_column: str | None = None,
    text_column: str | None = None,
    category_column: str | None = None,
    classes: Mapping[str, int] | None = None,
    progress: bool = True,
) -> BuildSummary:
    """Build `<folder>/00000.tar, ...` and the index `<folder>.parquet` from `source`.

    Args:
        source: a folder of images (sub-folders are categories; `x.txt` beside `x.jpg` is its
            caption; Hugging Face's metadata.csv or .jsonl counts), or a path, glob or braces of
            .csv, .tsv, .jsonl or .parquet tables, or of tar or zip archives.
        shard_samples: upper bound of the samples in a shard.
        shard_bytes: about the upper bound of its bytes.
        recipe: resizing and re-encoding.
        processes: shards written at once.
        image_column: column of tables that holds paths or bytes; well-known names are found.
        text_column: likewise for captions.
        category_column: likewise for categories, integers or names.
        classes: numbers of class names, by default in sorted order (labels.number_names); those
            that were used are written to `<folder>/classes.json`.

    Raises:
        ValueError: nothing usable is found, `folder` holds something else, another process builds
            there, or the disk is full.
    """
    if shard_samples < 1 or shard_bytes < 1:
        raise ValueError(f"shards of {shard_samples} samples and {shard_bytes} bytes hold nothing")
    folder, recipe = Path(check_name(str(folder)).rstrip("/")), recipe or Recipe()
    columns = Columns(image_column, text_column, category_column)
    listing = list_records(source, columns, classes)
    shards = deal(listing.records, shard_samples, shard_bytes, seed)
    options = {
        **asdict(recipe),
        **{f"{name}_column": value for name, value in asdict(columns).items()},
        **{"shard_samples": shard_samples, "shard_bytes": shard_bytes, "seed": seed},
    }
    index, again = Path(f"{folder}.parquet"), (folder / "build.json").exists()
    with _claimed(folder, source, options) as notes:
        _write_class_list(folder / "classes.json", listing)
        paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]
        with process_map(processes) as run:
            done = run(partial(write_shard, recipe=recipe, index=index), paths, shards)
            reports = list(tqdm(done, total=len(paths), unit="shard", disable=not progress))
        notes += listing.notes
        removed = _remove_others(folder, len(paths))
        if again:
            notes.append(_what_changed(reports, removed))
    left_out, examples = _left_out(listing, reports)
    if not any(report.samples for report in reports):
        causes = "\n".join(describe_problems(left_out, examples, "not written"))
        raise ValueError(f"none of the {len(listing.records):,} images could be used:\n{causes}")
    first = listing.records[0]
    kind: SourceKind = (
        "text" if first.category is None else "category" if first.text is None else "both"
    )
    summary = index_shards(
        [str(path) for path in paths],
        str(index),
        kind=kind,
        processes=processes,
        progress=False,
    )
    return BuildSummary(summary, left_out, examples, notes)


def deal(
    records: list[Record], shard_samples: int, shard_bytes: int, seed: int
) -> list[list[Record]]:
    """Shuffle and cut in the fewest shards within both bounds, equal to within one sample."""
    total = sum(record.size or _UNKNOWN_BYTES for record in records)
    count = max(-(-len(records) // shard_samples), -(-total // shard_bytes))
    count = min(count, len(records))
    order = sorted(records, key=partial(_shuffle_key, seed))
    cuts = [len(order) * i // count for i in range(count + 1)]
    return [order[i:j] for i, j in pairwise(cuts)]


def _shuffle_key(seed: int, record: Record) -> tuple[int, int]:
    """Random, but rows of one row group of a table stay together."""
    name = crc32(record.url.encode("utf-8", "surrogateescape"))
    if record.row >= 0:
        block = int(hash64(seed, name, record.group + 1)[0])
        return block, int(hash64(seed, name, record.row + 1)[0])
    inside = f"{record.column}\n{record.text}".encode("utf-8", "surrogateescape")
    return int(hash64(seed, name, record.offset, crc32(inside))[0]), 0


@contextmanager
def _claimed(folder: Path, source: str, options: dict[str, Any]) -> Iterator[list[str]]:
    """Hold the folder of a build; yield what is different from the last build there.

    What interrupted builds left half written is removed, before and after.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder} is a file: name a folder for the shards") from None
    note = folder / "build.json"
    plan = {"format": FORMAT, "source": _absolute(source), "options": options}
    if not note.exists() and any(folder.glob("*.tar")):
        raise ValueError(
            f"{folder} holds .tar files that no build wrote: choose another folder for the shards"
        )
    with _locked(folder):
        notes = _differences(folder, note, plan)
        try:
            _remove_temporary(folder)
            with written(note) as temporary:
                temporary.write_text(json.dumps(plan, indent=1))
            yield notes
        finally:
            _remove_temporary(folder)


def _differences(folder: Path, note: Path, plan: dict[str, Any]) -> list[str]:
    """What the last build in this folder had different; refuse another source."""
    try:
        last = json.loads(note.read_text())
        before = _absolute(last["source"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        return [f"{note} was damaged: every shard was looked at anew"]
    if before != plan["source"]:
        raise ValueError(
            f"{folder} holds another build (of {before}): choose another folder or delete it"
        )
    options = last.get("options", {})
    return [
        f"another {name} than in the last build: {options[name]!r} -> {value!r}"
        for name, value in plan["options"].items()
        if name in options and options[name] != value
    ]


def _absolute(source: str) -> str:
    return os.path.abspath(source) if is_local(source) else source


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse a second build in `folder`; where locks are not supported, do without."""
    handle = os.open(folder / "build.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process builds in {folder}: wait until it is done") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _remove_others(folder: Path, count: int) -> int:
    """Remove the shards of an earlier build that had more; return how many."""
    removed = 0
    for path in folder.glob("[0-9]*.tar"):
        if path.stem.isdigit() and int(path.stem) >= count:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            removed += 1
    return removed


def _write_class_list(path: Path, listing: Listing) -> None:
    if listing.classes:
        labels.write_classes(path, listing.classes)
    else:
        path.unlink(missing_ok=True)


def _what_changed(reports: Sequence[Report], removed: int) -> str:
    fresh = sum(report.fresh for report in reports)
    said = f"{fresh:,} shards written, {len(reports) - fresh:,} unchanged since the last build"
    return said + (f", {removed:,} removed" if removed else "")


def _left_out(listing: Listing, reports: Sequence[Report]) -> tuple[dict[str, int], dict[str, str]]:
    counts, examples = Counter(listing.left_out), dict(listing.examples)
    for report in reports:
        counts.update(report.left_out)
        examples = {**report.examples, **examples}
    return dict(counts), examples
