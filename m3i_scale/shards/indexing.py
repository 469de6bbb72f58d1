"""Making an index: scan many shards, local or remote, in parallel, resumably."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from m3i_scale.config import SourceKind
from m3i_scale.data import labels
from m3i_scale.data.bad_sample import remedy
from m3i_scale.data.files import written
from m3i_scale.data.index import FORMAT, ShardIndex, read_notes, write_index
from m3i_scale.data.retry import cause_of
from m3i_scale.data.storage import (
    StorageClient,
    is_local,
    local_path,
    parent,
)
from m3i_scale.shards.scan import Findings, Wanted, index_shard, wanted_for
from m3i_scale.shards.sources import check_name, find_files, last_change, missing
from m3i_scale.shards.workers import process_map

_SCAN = 3  # version of the scan: parts of another one are not used
_MOST_NAMED = 10


class ShardsUnreached(ValueError):  # noqa: N818  (the name is the message)
    """Shards could not be read, and the index was not written without them."""


@dataclass(frozen=True)
class IndexSummary:
    """What an index run found."""

    shards: int
    samples: int
    bytes: int
    problems: dict[str, int]  # by cause
    examples: dict[str, str] = field(default_factory=dict)  # by cause: a shard and sample
    largest_category: int = -1
    classes: int = 0  # labels that are class names
    gaps: dict[str, int] = field(default_factory=dict)  # samples without one of several captions

    def __str__(self) -> str:
        lines = [f"{self.samples:,} samples in {self.shards:,} shards, {self.bytes / 1e9:,.2f} GB"]
        if self.largest_category >= 0:
            named = f", {self.classes:,} of them by name" if self.classes else ""
            lines.append(
                f"  categories up to {self.largest_category:,}{named}: "
                f"model.categories must be {self.largest_category + 1:,} or more"
            )
        lines += [
            f"  {count:,} samples have no caption in {place}: their others are used"
            for place, count in self.gaps.items()
        ]
        return "\n".join([*lines, *describe_problems(self.problems, self.examples, "left out")])


def describe_problems(
    problems: Mapping[str, int], examples: Mapping[str, str], outcome: str
) -> Iterator[str]:
    """A line for every cause, the commonest first: count, example and remedy."""
    for cause, count in sorted(problems.items(), key=lambda item: -item[1]):
        first = f" ({examples[cause]})" if examples.get(cause) else ""
        advice = f"; {remedy(cause)}" if remedy(cause) else ""
        line = f"  {count:,} {outcome}: {cause}{first}{advice}"
        yield line.encode("utf-8", "backslashreplace").decode()  # file names can be any bytes


def index_shards(
    shards: Sequence[str],
    output: str,
    *,
    kind: SourceKind,
    text_member: str | Sequence[str] | None = None,
    category_member: str | None = None,
    classes: Mapping[str, int] | None = None,
    processes: int = 1,
    storage: StorageClient | None = None,
    skip_unreached: bool = False,
    progress: bool = True,
) -> IndexSummary:
    """Index `shards` into the Parquet file `output`.

    Args:
        shards: paths, URLs, folders, globs, or WebDataset's braces (`sources.find_files`).
        kind: what a sample must have: "text", "category" or "both".
        text_member: where captions are, e.g. "txt" or "json:caption"; found by itself if None. Of
            several, a sample needs one, and `data.sources.N.captions` says how often each is shown.
        category_member: likewise, e.g. "cls" or "json:label".
        classes: numbers of the labels that are class names, as another index or a class list has
            them; by default names are numbered (labels.number_names) and written to
            `<output without .parquet>.classes.json`.
        processes: shards scanned at once.
        skip_unreached: leave out shards that are missing or cannot be read.

    Finished shards are kept in `<output>.parts/` until the index is written, so that an interrupted
    run goes on where it stopped.  A damaged shard becomes a row of problems, never an error.

    Raises:
        ShardsUnreached: a shard is missing or cannot be read; nothing is written, and the parts of
            the others are kept.
        ValueError: no shard is found or no shard holds a usable sample.
    """
    if not is_local(output):
        raise ValueError(f"cannot write the index to {output}: write it to a path and copy it")
    check_name(output)
    storage = storage or StorageClient()
    wanted = wanted_for(kind, text_member, category_member, classes)
    urls = find_files(shards, (".tar",), storage)
    for url in urls:
        check_name(relative_to(output, url))
    if not urls:
        raise ValueError(f"no shard matches {list(shards)}")
    parts = Path(f"{output}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    for leftover in parts.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    scan = partial(_scan_to_part, folder=parts, wanted=wanted, storage=storage)
    with process_map(processes) as run:
        done = run(scan, urls)
        paths = list(tqdm(done, total=len(urls), unit="shard", disable=not progress))
    unreached = [
        (url, part) for url, part in zip(urls, paths, strict=True) if part.suffix == _FAILED
    ]
    if unreached and not skip_unreached:
        raise ShardsUnreached(_unreached_message(unreached, len(urls)))
    summary = _merge(paths, urls, output, wanted, parts)
    shutil.rmtree(parts)
    return summary


def _unreached_message(unreached: Sequence[tuple[str, Path]], total: int) -> str:
    lines = [f"{len(unreached):,} of {total:,} shards could not be read; no index was written:"]
    for url, part in unreached[:_MOST_NAMED]:
        row = pq.read_table(part, columns=["problems"]).to_pylist()[0]
        cause = row["problems"][0]["cause"]
        lines.append(f"  {url}: {cause} ({read_notes(part)['examples'].get(cause, '')})")
    if len(unreached) > _MOST_NAMED:
        lines.append(f"  ... and {len(unreached) - _MOST_NAMED:,} more")
    return "\n".join(
        [*lines, "correct the names or wait for the storage, and run the same command again (what "
         "was scanned is kept), or leave these shards out with --skip-unreached"]
    )  # fmt: skip


_FAILED = ".failed"


def _scan_to_part(url: str, *, folder: Path, wanted: Wanted, storage: StorageClient) -> Path:
    """Index one shard into its own small file in `folder`, unless an earlier run did.

    The part of a shard that could not be read ends in `.failed`: later runs try that one again.
    """
    findings = Findings()
    try:
        size = storage.size(url)
    except OSError as error:
        shard = _unreached(url, error, findings)
        return _save(_part_path(folder, url, 0, wanted).with_suffix(_FAILED), shard, findings)
    done = _part_path(folder, url, size, wanted)
    if done.exists():
        return done
    try:
        shard, findings = storage.retry(
            lambda: _scan(url, size, wanted, storage), f"indexing {url}"
        )
    except OSError as error:
        shard = _unreached(url, error, findings)
        return _save(done.with_suffix(_FAILED), shard, findings)
    return _save(done, shard, findings)


def _scan(
    url: str, size: int, wanted: Wanted, storage: StorageClient
) -> tuple[ShardIndex, Findings]:
    findings = Findings()
    with storage.open(url) as file:
        return index_shard(url, file, size, wanted, findings), findings


def _unreached(url: str, error: OSError, findings: Findings) -> ShardIndex:
    cause = cause_of(error)
    findings.note(cause, "", missing(url) if cause == "missing shard" else str(error))
    return ShardIndex(url, 0, problems=[{"key": "", "cause": cause}])


def _part_path(folder: Path, url: str, size: int, wanted: Wanted) -> Path:
    what = f"{FORMAT}|{_SCAN}|{url}|{size}|{last_change(url)}|{wanted}"
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return folder / f"{name}.parquet"


def _save(path: Path, shard: ShardIndex, findings: Findings) -> Path:
    notes = {
        "largest": findings.largest,
        "names": sorted(findings.names),
        "examples": findings.examples,
        "gaps": findings.gaps,
    }
    with written(path) as temporary:
        write_index(str(temporary), [shard.table()], notes)
    return path


def _merge(
    parts: Sequence[Path], urls: Sequence[str], output: str, wanted: Wanted, folder: Path
) -> IndexSummary:
    """Join the parts in the order of `urls`; paths below the index become relative to it."""
    problems, totals = Counter[str](), Counter[str]()
    examples = dict[str, str]()
    names, largest, gaps = set[str](), -1, Counter[str]()
    for part, url in zip(parts, urls, strict=True):
        found = read_notes(part)
        names.update(found["names"])
        gaps.update(found["gaps"])
        largest = max(largest, found["largest"])
        for cause, example in found["examples"].items():
            examples.setdefault(cause, ", ".join(text for text in (url, example) if text))
    classes = dict(wanted.classes or labels.number_names([*names, largest]))
    if not wanted.category:
        classes = {}
    largest = max([largest, *(classes[name] for name in names)])

    def tables() -> Iterator[pa.Table]:
        for part, url in zip(parts, urls, strict=True):
            table = pq.read_table(part)
            row = table.select(["samples", "bytes", "problems"]).to_pylist()[0]
            problems.update(problem["cause"] for problem in row["problems"])
            totals.update(samples=row["samples"], bytes=row["bytes"])
            yield table.set_column(0, "shard", pa.array([relative_to(output, url)]))

    whole = folder / "whole.index"
    with written(whole) as temporary:
        notes = {"classes": classes, "largest_category": largest, "gaps": gaps}
        write_index(str(temporary), tables(), notes)
    if totals["samples"] == 0:
        raise ValueError(
            "\n".join(
                [
                    f"no usable sample in {len(urls):,} shards:",
                    *describe_problems(problems, examples, "left out"),
                ]
            )
        )
    if names and wanted.classes is None:
        labels.write_classes(class_list(output), classes)
    os.replace(whole, output)
    return IndexSummary(
        len(urls), totals["samples"], totals["bytes"], dict(problems), examples, largest,
        len(names), dict(gaps),
    )  # fmt: skip


def class_list(output: str) -> str:
    """Where the class list of an index goes: `a.parquet` -> `a.classes.json`."""
    return f"{output.removesuffix('.parquet')}.classes.json"


def relative_to(output: str, url: str) -> str:
    """The shard's name in the index: relative where it lies below the folder of the index."""
    base = parent(output) or "."
    if is_local(url) and is_local(output):
        folder, path = os.path.abspath(local_path(base)), os.path.abspath(local_path(url))
        return os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path
    return url.removeprefix(base.rstrip("/") + "/")
