"""Damaged inputs by the thousand: nothing crashes, hangs, shifts a sample or fills the memory.

    python benchmarks/fuzz_data.py [--inputs 10000] [--seed 0] [--children 2] [--out FILE.json]
    python benchmarks/fuzz_data.py --kind index_lying --number 13     one input, with its traceback

Twenty-two kinds of damage to shards, pictures, captions, labels, indexes, checkpoints,
configurations, weights and a run's records. Input n is of kind n modulo 22, and a function of the
seed and n. Each is handled as training and `m3i` handle it, in a forked child, and must end in one
of three ways:

    unharmed   nothing is lost
    named      what is damaged is counted under its cause; all else comes as it was
    refused    one sentence and exit code 2

Everything else is a fault:

    crash      the process ended
    hang       more than 10 s of processor time, or 300 s
    traceback  an error that no sentence explains, or another exit code than 2
    sentence   a refusal that is empty or longer than 2,000 characters
    shifted    a good sample came at another position, with other content or another's caption
    silent     damaged content was taken for good, where something could tell: a checkpoint or an
               index, which have checksums (a picture and exported weights have none)
    memory     more than the bound of its kind (`BOUNDS`)

Exit code 1 if there is any fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

import numpy as np
from fuzzing import files, pool, shards
from fuzzing.damage import MIB, NAMED, REFUSED, UNHARMED
from fuzzing.pool import Kind, Result
from fuzzing.samples import MAX_PIXELS
from origin import origin

# Bytes that one input may take beyond what the process had before.
BOUNDS = {
    # Pixels as Pillow unpacks them (4 bytes), a converted copy or two, and the decoder's own.
    "picture": 32 * MAX_PIXELS + 32 * MIB,
    # Captions, labels and documents have 1 MiB at most; Python's objects of a document many times.
    "text": 128 * MIB,
    # A shard of some 30 kB, an index of some 10 kB.
    "shard": 64 * MIB,
    # Checkpoints and weights of some 100 kB; a packed file may unpack to some times its size.
    "file": 64 * MIB,
    # At most 100,000 values.
    "configuration": 256 * MIB,
}
KINDS = [
    *(Kind(run.__name__, run, BOUNDS["shard"]) for run in (
        shards.tar_changed_later, shards.tar_resized_later, shards.tar_lying_headers,
        shards.tar_rearranged, shards.tar_foreign, shards.index_damaged, shards.index_lying,
    )),
    *(Kind(run.__name__, run, BOUNDS["picture"]) for run in (
        shards.image_changed, shards.image_resized, shards.image_lying, shards.image_notes,
    )),
    *(Kind(run.__name__, run, BOUNDS["text"]) for run in (
        shards.caption_bytes, shards.caption_json, shards.labels,
    )),
    *(Kind(run.__name__, run, BOUNDS["file"]) for run in (
        files.checkpoint_damaged, files.checkpoint_lying, files.weights_damaged,
        files.weights_published, files.weights_folders, files.run_records,
    )),
    *(Kind(run.__name__, run, BOUNDS["configuration"]) for run in (
        files.config_damaged, files.config_hostile,
    )),
]  # fmt: skip
GOOD = (UNHARMED, NAMED, REFUSED)
FAULTS = ("crash", "hang", "traceback", "sentence", "shifted", "silent", "memory")


def import_everything() -> None:
    """Once, here, and not in each child that takes a crashed one's place."""
    import torch

    torch.set_num_threads(1)
    from m3i_scale.engine import saver  # noqa: F401
    from m3i_scale.integrations import initial  # noqa: F401
    from m3i_scale.models import tokenizer  # noqa: F401
    from m3i_scale.report import page, summary  # noqa: F401
    from m3i_scale.transfer import export  # noqa: F401


def table(results: list[Result]) -> list[dict[str, Any]]:
    """One row per kind of damage."""
    by_kind = defaultdict[str, list[Result]](list)
    for result in results:
        by_kind[result.kind].append(result)
    rows = []
    for kind in KINDS:
        found = by_kind[kind.name]
        counts = Counter(result.outcome for result in found)
        rows.append({
            "kind": kind.name, "inputs": len(found), **{name: counts[name] for name in GOOD},
            "faults": sum(counts[name] for name in FAULTS),
            "peak_mib": round(max((r.peak for r in found), default=0) / MIB, 1),
            "bound_mib": round(kind.bound / MIB, 1),
            "longest_cpu_seconds": round(max((r.seconds for r in found), default=0.0), 2),
        })  # fmt: skip
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = report["kinds"]
    names = list(rows[0])
    faults = ", ".join(f"{count} {name}" for name, count in report["faults"].items())
    lines = [
        f"`{report['command']}`: {report['inputs']:,} inputs in {report['cpu_seconds']:.0f} s of "
        f"processor time; {faults}.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| --- |" + " ---: |" * (len(names) - 1),
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def one(name: str, number: int, seed: int) -> int:
    """Run one input in this process, without any protection."""
    kind = next(kind for kind in KINDS if kind.name == name)
    with tempfile.TemporaryDirectory() as folder:
        print(kind.run(np.random.default_rng([seed, number]), Path(folder)))
    return 0


def main() -> int:
    """Run all inputs, print the faults and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="this kind alone")
    parser.add_argument("--number", type=int, help="this input alone; with --kind")
    parser.add_argument("--out", type=Path, help="write the figures there, and a page beside it")
    args = parser.parse_args()
    if args.number is not None:
        return one(args.kind or KINDS[args.number % len(KINDS)].name, args.number, args.seed)
    import_everything()
    begun, results = time.time(), list[Result]()
    numbers = [n for n in range(args.inputs)
               if args.kind in (None, KINDS[n % len(KINDS)].name)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for found in pool.run_all(KINDS, numbers, args.seed, args.children, Path(folder)):
            results.append(found)
            if found.outcome not in GOOD:
                print(f"{found.number:6} {found.kind}: {found.outcome}: {found.words}", flush=True)
    counts = Counter(result.outcome for result in results)
    report = {
        "command": f"python benchmarks/fuzz_data.py --inputs {args.inputs} --seed {args.seed}",
        "inputs": len(results),
        "faults": {name: counts[name] for name in FAULTS},
        "cpu_seconds": round(sum(result.seconds for result in results), 1),
        "wall_seconds": round(time.time() - begun, 1),
        "kinds": table(results),
        "origin": origin(),
    }
    print(markdown(report), end="")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    return int(any(report["faults"].values()))  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
