"""Start-up of a run on 442 million samples: time, memory, and what is asked of the storage.

    python benchmarks/resume.py [--folder /tmp/m3i-resume] [--ranks 512] [--workers 8]

Writes indexes of the paper's size (427M pairs in 43,500 shards and 15M labelled images in 1,500;
about 3 GB, made once) whose shards need not exist, and then, in a fresh process:

1. builds the stream and resumes in the middle of the run (position 9,000,000,000);
2. forks workers of random ranks, which work out the samples of their next windows and the reads
   that these take, everything but the reads themselves;
3. reports the time to the first batch's reads (wall and, where other work runs on the machine,
   processor time), the time of the imports by themselves, private memory of the workers, and over
   the windows: samples per read, bytes per read, and bytes asked for per byte used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from m3i_scale.config import SourceKind

# Set by `_adopt` in each worker.
STREAM: Any
ARGS: argparse.Namespace

SOURCES: dict[SourceKind, tuple[int, int]] = {
    "text": (427_000_000, 43_500),
    "category": (15_000_000, 1_500),
}
START = 9_000_000_000


def write(path: Path, kind: str, samples: int, shards: int) -> None:
    """An index as `m3i shards index` would write it, of images of 21 kB on average."""
    import pyarrow as pa

    from m3i_scale.data.index import SCHEMA, write_index

    counts = np.diff(np.linspace(0, samples, shards + 1).round().astype(np.int64))

    def rows() -> Iterator[pa.Table]:
        for number, count in enumerate(counts.tolist()):
            rng = np.random.default_rng(number)
            size = rng.integers(7_000, 35_000, count)
            target = rng.integers(2, 120, count)
            image_blocks, json_blocks = 512 * (1 + -(-size // 512)), 2048 * (kind == "text")
            start = np.concatenate([[0], np.cumsum(image_blocks + json_blocks + 1024)])
            columns: dict[str, Any] = {name: [[]] for name in SCHEMA.names}
            columns |= {
                "shard": [f"s3://bucket/{kind}/{number:05d}.tar"],
                "bytes": [int(start[-1])],
                "samples": [count],
                "image_offset": [start[:-1] + 512],
                "image_size": [size],
                f"{kind}_offset": [start[:-1] + image_blocks + json_blocks + 512],
                f"{kind}_size": [target],
                "check": [rng.integers(0, 2**32, count)],
                "text_member": ["txt" if kind == "text" else None],
                "category_member": ["cls" if kind == "category" else None],
            }
            yield pa.table(columns, schema=SCHEMA)

    write_index(f"{path}.tmp", rows())
    os.replace(f"{path}.tmp", path)


def private_mib() -> float:
    """Memory of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def peak_mib() -> float:
    """Largest resident memory of this process so far, shared libraries and all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the stream, plan windows in workers; runs in a fresh process."""
    begin, busy = time.perf_counter(), time.process_time()
    import torch

    from m3i_scale.config import Data, Source
    from m3i_scale.data import Stream

    imports = {
        "imports_s": time.perf_counter() - begin,
        "imports_cpu_s": time.process_time() - busy,
        "imports_mib": peak_mib(),
    }
    begin, busy = time.perf_counter(), time.process_time()
    stream = Stream(
        Data(
            sources=[
                Source(name=kind, index=f"{args.folder}/{kind}.parquet", kind=kind)
                for kind in SOURCES
            ],
            image_size=192,
        ),
        seed=0,
        tokenize=lambda texts: (torch.zeros(len(texts), 32), torch.ones(len(texts), 32)),
        mask_sampler=lambda rng, size: rng.random((12, 12)) < 0.5,
        lanes=args.lanes,
    )
    built = {
        "built_s": time.perf_counter() - begin,
        "built_cpu_s": time.process_time() - busy,
    }
    rng = np.random.default_rng(1)
    results = []
    for _ in range(args.sampled):
        rank, worker = int(rng.integers(args.ranks)), int(rng.integers(args.workers))
        with get_context("fork").Pool(1, initializer=_adopt, initargs=(stream, args)) as pool:
            results.append(pool.apply(plan, (rank, worker)))
    mean = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    worst = {f"worst_{name}": max(result[name] for result in results) for name in results[0]}
    return {**imports, **built, **mean, **worst}


def _adopt(stream: Any, args: argparse.Namespace) -> None:
    global STREAM, ARGS
    STREAM, ARGS = stream, args


def plan(rank: int, worker: int) -> dict[str, float]:
    """What one worker does up to its reads: first batch, then full windows."""
    from m3i_scale.data.stream import Slices

    begin, busy = time.perf_counter(), time.process_time()
    slices = Slices(START, ARGS.micro_batch, rank, ARGS.ranks, None)
    blocks = slices.blocks(worker, ARGS.workers)
    reader = STREAM.maker().reader
    reader.plan(STREAM.order.locate(next(blocks)))
    first, first_cpu = time.perf_counter() - begin, time.process_time() - busy
    reads, asked, used, samples, busy = 0, 0, 0, 0, 0.0
    located = (STREAM.order.locate(block) for block in blocks)
    for window in islice(reader._windows(located), 9, 9 + ARGS.windows):
        begin = time.process_time()
        planned = reader.plan(_join(window))
        busy += time.process_time() - begin
        reads += len(planned.reads)
        asked += sum(stop - start for _, _, start, stop in planned.reads)
        used += int(planned.members[:, 1::2].clip(0).sum())
        samples += len(planned.start)
    return {
        "first_plan_s": first,
        "first_plan_cpu_s": first_cpu,
        "private_mib": private_mib(),
        "peak_mib": peak_mib(),
        "planning_cpu_us_per_sample": busy / samples * 1e6,
        "samples_per_read": samples / reads,
        "kib_per_read": asked / reads / 1024,
        "bytes_asked_per_byte_used": asked / used,
    }


def _join(window: list) -> Any:
    from m3i_scale.data.order import Located

    names = ("position", "source", "epoch", "shard", "sample")
    return Located(*(np.concatenate([getattr(part, name) for part in window]) for name in names))


def main() -> None:
    """Make the indexes if need be, then measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/m3i-resume"))
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=80)
    parser.add_argument("--lanes", type=int, default=40_960, help="512 * 80: the global batch")
    parser.add_argument("--sampled", type=int, default=3, help="workers to look at")
    parser.add_argument("--windows", type=int, default=4, help="windows each of them plans")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for kind, (samples, shards) in SOURCES.items():
        path = args.folder / f"{kind}.parquet"
        if not path.exists():
            print(f"writing {path} ...", flush=True)
            write(path, kind, samples, shards)
    again = [sys.executable, *sys.argv, "--measure"]
    found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
    for name, value in found.items():
        print(f"{name:34} {value:10.2f}")


if __name__ == "__main__":
    main()
