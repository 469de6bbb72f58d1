"""Making an index: scan many shards, local or remote, in parallel, resumably."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from m3i_scale.data.bad_sample import explain
from m3i_scale.data.index import FORMAT, ShardIndex, write_index
from m3i_scale.data.retry import cause_of
from m3i_scale.data.storage import (
    Storage,
    is_local,
    local_path,
    parent,
    retrying,
)
from m3i_scale.shards.scan import Wanted, index_shard, wanted_for


@dataclass(frozen=True)
class IndexSummary:
    """What an index run found."""

    shards: int
    samples: int
    bytes: int
    problems: dict[str, int]  # by cause

    def __str__(self) -> str:
        lines = [f"{self.samples:,} samples in {self.shards:,} shards, {self.bytes / 1e9:,.2f} GB"]
        return "\n".join([*lines, *(f"  left out: {line}" for line in explain(self.problems))])


def index_shards(
    shards: Sequence[str],
    output: str,
    *,
    kind: str,
    text_member: str | None = None,
    category_member: str | None = None,
    processes: int = 1,
    storage: Storage | None = None,
    progress: bool = True,
) -> IndexSummary:
    """Index `shards` (paths, URLs or globs of either) into the Parquet file `output`.

    Args:
        kind: what a sample must have: "text", "category" or "both".
        text_member: where captions are, e.g. "txt" or "json:caption"; found by itself if None.
        category_member: likewise, e.g. "cls" or "json:label".
        processes: shards scanned at once.

    Finished shards are kept in `<output>.parts/` until all are done, so that an interrupted run
    goes on where it stopped.  A damaged shard becomes a row of problems, never an error; raises
    ValueError when no shard is found or no shard holds a usable sample.
    """
    if not is_local(output):
        raise ValueError(f"cannot write the index to {output}: write it to a path and copy it")
    storage = storage or Storage()
    wanted = wanted_for(kind, text_member, category_member)
    urls = _expand(shards, storage)
    parts = Path(f"{output}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    scan = partial(_scan_to_part, folder=parts, wanted=wanted, storage=storage)
    with process_map(processes) as run:
        done = run(scan, urls)
        paths = list(tqdm(done, total=len(urls), unit="shard", disable=not progress))
    summary = _merge(paths, urls, output)
    shutil.rmtree(parts)
    return summary


def _expand(shards: Sequence[str], storage: Storage) -> list[str]:
    urls: list[str] = []
    for shard in shards:
        storage.check(shard)
        urls += storage.glob(shard) if any(c in shard for c in "*?[") else [shard]
    urls = list(dict.fromkeys(urls))
    if not urls:
        raise ValueError(f"no shard matches {list(shards)}")
    compressed = [url for url in urls if url.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))]
    if compressed:
        raise ValueError(
            f"{compressed[0]} is compressed: samples are read by offset, so unpack it to a .tar"
        )
    return urls


@contextmanager
def process_map(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over that many processes, results in order."""
    if processes <= 1:
        yield map
        return
    # Forked, because a new interpreter would first import torch for half a minute; fsspec and
    # pyarrow both start their threads anew in a forked child.
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield partial(pool.map, chunksize=1)


def _scan_to_part(url: str, *, folder: Path, wanted: Wanted, storage: Storage) -> Path:
    """Index one shard into its own small file in `folder`, unless an earlier run did."""
    try:
        size = storage.size(url)
    except OSError as error:
        return _save(folder, url, 0, wanted, _unreadable(url, error))
    done = _part_path(folder, url, size, wanted)
    if done.exists():
        return done
    try:
        shard = retrying(
            lambda: _scan(url, size, wanted, storage),
            f"indexing {url}",
            attempts=storage.attempts,
            first_wait=storage.first_wait,
        )
    except OSError as error:
        shard = _unreadable(url, error)
    return _save(folder, url, size, wanted, shard)


def _scan(url: str, size: int, wanted: Wanted, storage: Storage) -> ShardIndex:
    with storage.open(url) as file:
        return index_shard(url, file, size, wanted)


def _unreadable(url: str, error: OSError) -> ShardIndex:
    return ShardIndex(url, 0, problems=[{"key": "", "cause": cause_of(error)}])


def _part_path(folder: Path, url: str, size: int, wanted: Wanted) -> Path:
    name = hashlib.sha256(f"{FORMAT}|{url}|{size}|{wanted}".encode()).hexdigest()[:32]
    return folder / f"{name}.parquet"


def _save(folder: Path, url: str, size: int, wanted: Wanted, shard: ShardIndex) -> Path:
    path = _part_path(folder, url, size, wanted)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    write_index(str(temporary), [shard.table()])
    os.replace(temporary, path)
    return path


def _merge(parts: Sequence[Path], urls: Sequence[str], output: str) -> IndexSummary:
    """Join the parts in the order of `urls`; paths below the index become relative to it."""
    problems: Counter[str] = Counter()
    totals: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        for part, url in zip(parts, urls, strict=True):
            table = pq.read_table(part)
            row = table.select(["samples", "bytes", "problems"]).to_pylist()[0]
            problems.update(problem["cause"] for problem in row["problems"])
            totals.update(samples=row["samples"], bytes=row["bytes"])
            yield table.set_column(0, "shard", pa.array([relative_to(output, url)]))

    temporary = f"{output}.{os.getpid()}.tmp"
    write_index(temporary, tables())
    if totals["samples"] == 0:
        os.remove(temporary)
        raise ValueError(
            f"no usable sample in {len(urls)} shards; left out: {'; '.join(explain(problems))}"
        )
    os.replace(temporary, output)
    return IndexSummary(len(urls), totals["samples"], totals["bytes"], dict(problems))


def relative_to(output: str, url: str) -> str:
    """The shard's name in the index: relative where it lies below the folder of the index."""
    base = parent(output) or "."
    if is_local(url) and is_local(output):
        folder, path = os.path.abspath(local_path(base)), os.path.abspath(local_path(url))
        return os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path
    return url.removeprefix(base.rstrip("/") + "/")
