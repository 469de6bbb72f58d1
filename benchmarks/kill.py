"""kill -9, again and again: a run that is killed at random must end like one that was left alone.

    python benchmarks/kill.py [--kills 20] [--ranks 2] [--seed 0] [--folder /tmp/m3i-kill]
                              [--out FILE.json]
    python benchmarks/kill.py --elastic       another number of ranks (1, 2 or 3) at every restart

Trains a small network with the whole loop (data, ZeRO-3, momentum, checkpoints after every step) on
CPU ranks: once undisturbed, and once while a rank chosen at random is killed again and again: while
it starts, between steps, and most of all while a checkpoint is written, published or pruned. After
each kill everything is started again, from what lies on the disk.

On a constant number of ranks the two must be equal to the last bit: all losses and norms of all
steps, and in the last checkpoint weights, Adam moments, teacher averages, generators' states and
counters. With `--elastic` the batch is kept by accumulation, sums are added in another order, and
training multiplies the difference (from 1e-7 to some 1e-3 in a hundred steps). Undisturbed runs on
1 and 3 ranks show by how much: at no step may the killed run differ more than `--factor` times as
much as they do by then. A sample that is lost or read twice differs at once by 1e-2. Texts are told
apart in the whole batch (`negatives: batch`), because a micro-step has other ones on another number
of ranks.

Prints one line per kill. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from forks import Ranks, wait_for
from origin import origin

from m3i_scale.engine.lines import of_training

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
# The demonstration's networks made smaller, with draws of drop-path that must continue, too.
CHANGES = """
model:
  backbone:
    options: {channels: 16, groups: [1, 2, 4, 8], clip_projector_width: 64, clip_heads: 4,
              clip_embed_dim: 64, drop_path_rate: 0.2}
  decoder: {width: 64, ffn: 128}
  text: {vocab_size: 400, width: 64, ffn: 128, max_length: 12, embed_dim: 32}
optimizer: {global_batch_size: 12, max_micro_batch: 4, warmup: 2 steps}
engine: {timeout_minutes: 2, stall_minutes: 5}
checkpoint: {every: 1 step, keep_last: 2}
logging: {trackers: [], pictures: false}
"""
PATIENCE = 600.0  # seconds for what takes a few
LEAST = 1e-6  # relative difference that rounding may have come to at the first steps


class Kill(NamedTuple):
    """One line of the table."""

    aim: str  # what was waited for
    ranks: int
    victim: int
    saving: bool  # whether a checkpoint was half-written at that moment
    seen: int  # steps in the metrics
    saved: int  # step of the newest complete checkpoint
    survivors: str  # how the other ranks ended
    seconds: float


# ------------------------------------------------------------------------------------ one workload


def prepare(folder: Path, steps: int, elastic: bool) -> Path:
    """Draw the data, once, and write the configuration; its path."""
    data = folder / "data"
    if not (data / "tokenizer.json").exists():
        cli = [sys.executable, "-m", "m3i_scale.cli"]
        subprocess.run([*cli, "glyphs", "--out", str(data)], check=True)
        tokenizer = ["--vocab-size", "400", "--out", f"{data}/tokenizer.json"]
        subprocess.run([*cli, "tokenizer", f"{data}/text.parquet", *tokenizer], check=True)
    tree = yaml.safe_load(CHANGES) | {"base": str(DEMO)}
    tree["optimizer"]["duration"] = f"{steps} steps"
    tree["data"] = {
        "sources": [
            {"name": kind, "index": f"{data}/{kind}.parquet", "kind": kind}
            for kind in ("text", "category")
        ]
    }
    tree["model"]["text"]["tokenizer"] = f"{data}/tokenizer.json"
    if elastic:
        tree["objective"] = {"negatives": "batch"}  # the same on any number of ranks
    path = folder / "kill.yaml"
    path.write_text(yaml.safe_dump(tree | {"run": "unnamed", "folder": str(folder)}))
    return path


def start(configuration: Path, run: Path, ranks: int) -> Ranks:
    """The training program, on so many ranks."""

    def work() -> int:
        sys.argv = ["train.py", "--config", str(configuration), f"run={run.name}"]
        from m3i_scale import train

        return train.main()

    return Ranks(ranks, work, run)


def import_everything() -> None:
    """Once, here, and not in each of some hundred processes. No computation: they are forked."""
    import torch

    torch.set_num_threads(1)
    from m3i_scale import train  # noqa: F401
    from m3i_scale.engine import session  # noqa: F401
    from m3i_scale.tasks import pretraining  # noqa: F401

    gc.freeze()  # a collection in a rank would copy all of it


# ----------------------------------------------------------------------------------------- killing


def kill_once(
    configuration: Path, run: Path, ranks: int, aim: str, chance: random.Random
) -> Kill | None:
    """Start, wait for what was aimed at and a little longer, kill a rank; None: it has finished."""
    started, victim = time.time(), chance.randrange(ranks)
    lines, delay = lines_in(run) + chance.randint(1, 3), chance.random()
    attempt = start(configuration, run, ranks)
    if aim == "start":
        time.sleep(4 * delay)
    elif aim == "step":
        wait_for(lambda: lines_in(run) >= lines or attempt.poll(), PATIENCE)
        time.sleep(0.5 * delay)
    else:
        wait_for(lambda: lines_in(run) >= lines or attempt.poll(), PATIENCE)
        wait_for(lambda: half_written(run, started) or attempt.poll(), PATIENCE)
        time.sleep(0.1 * delay)
    if attempt.poll() and not any(attempt.codes):
        return None
    saving = half_written(run, started)
    os.kill(attempt.pids[victim], signal.SIGKILL)
    alone = attempt.wait(60)
    others = [str(code) for rank, code in enumerate(attempt.codes) if rank != victim]
    ended = "exit " + ", ".join(others) if alone else "killed after 60 s"
    took = time.time() - started
    seen = len(read_curve(run))
    return Kill(aim, ranks, victim, saving, seen, newest(run), ended if others else "-", took)


def half_written(run: Path, since: float) -> bool:
    """Whether a checkpoint is on its way, and not left over."""
    with contextlib.suppress(OSError):  # it has got its name meanwhile
        return any(p.stat().st_mtime > since for p in (run / "checkpoints").glob("*.partial"))
    return False


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint."""
    from m3i_scale.engine import checkpoint

    found = checkpoint.complete_checkpoints(run / "checkpoints")
    return checkpoint.step_of(found[-1]) if found else 0


def lines_in(run: Path) -> int:
    """Number of lines of the metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --------------------------------------------------------------------------------------- comparing


def read_line(line: str) -> dict[str, Any]:
    """One step's measurements; "NaN", what could not be measured, is then equal to itself."""
    return json.loads(line, parse_constant=str)


def read_curve(run: Path) -> dict[int, dict[str, Any]]:
    """All measurements but those of time and machine; by step, which may have been made twice."""
    path, found = run / "metrics.jsonl", dict[int, dict[str, Any]]()
    for line in path.read_text().splitlines() if path.exists() else ():
        values = read_line(line)
        kept = of_training(values)
        found.setdefault(kept.pop("step"), kept)
    return found


def repeated_differently(run: Path) -> Iterable[str]:
    """Steps that were made twice and came out in two ways."""
    first = read_curve(run)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = read_line(line)
        if any(values[name] != value for name, value in first[values["step"]].items()):
            yield f"step {values['step']} came out differently when it was made again"


def differences(run: Path, whole: Path) -> Iterable[str]:
    """What is not equal to the last bit."""
    from safetensors.torch import load_file

    from m3i_scale.engine import checkpoint

    yield from repeated_differently(run)
    a, b = read_curve(run), read_curve(whole)
    yield from (f"step {n} is missing or differs" for n in b if a.get(n) != b[n])
    ours, theirs = (checkpoint.complete_checkpoints(r / "checkpoints")[-1] for r in (run, whole))
    if (damage := checkpoint.verify(ours)) is not None:
        yield damage
    if (ours / "state.json").read_text() != (theirs / "state.json").read_text():
        yield f"{ours} and {theirs} have different counters"
    for path in theirs.glob("*.safetensors"):
        left, right = load_file(ours / path.name), load_file(path)
        for name in right.keys() | left.keys():
            if name not in left or name not in right or not left[name].equal(right[name]):
                yield f"{path.name}: {name} differs"


def deviations(run: Path, whole: Path) -> list[float]:
    """Of each step the largest relative difference of a loss; endless where a step is missing."""
    a, b = read_curve(run), read_curve(whole)
    names = [name for name in b[0] if name.startswith("loss/")]
    return [
        max(abs(float(a[n][name]) / float(b[n][name]) - 1) for name in names)
        if n in a
        else math.inf
        for n in sorted(b)
    ]


def beyond_rounding(found: Sequence[float], rounding: Sequence[float], factor: float) -> list[int]:
    """Steps at which `found` is more than `factor` times what `rounding` has come to by then."""
    reached = itertools.accumulate([max(LEAST, rounding[0]), *rounding[1:]], max)
    return [n for n, most in enumerate(reached) if not found[n] <= factor * most]


class Outcome(NamedTuple):
    """What the comparison with the undisturbed run has come to."""

    passed: bool
    words: list[str]


def compare(run: Path, whole: Path) -> Outcome:
    """Bit for bit."""
    problems = list(differences(run, whole))
    return Outcome(not problems, problems or ["equal to the undisturbed run, bit for bit"])


def compare_within_rounding(
    run: Path, whole: Path, others: Sequence[Path], factor: float
) -> Outcome:
    """Against what undisturbed runs on other numbers of ranks differ by."""
    found = deviations(run, whole)
    rounding = [max(at) for at in zip(*(deviations(o, whole) for o in others), strict=True)]
    wrong = beyond_rounding(found, rounding, factor)
    words = (
        f"largest relative difference of a loss {max(found):.1e}, of undisturbed runs on other "
        f"ranks {max(rounding):.1e}; at step {len(found) // 10} {found[len(found) // 10]:.1e} and "
        f"{rounding[len(found) // 10]:.1e}"
    )
    beyond = [f"step {n}: {found[n]:.1e} is beyond rounding, {rounding[n]:.1e}" for n in wrong]
    return Outcome(not wrong, [words, *beyond])


# ----------------------------------------------------------------------------------------- program


def main() -> int:
    """Train twice, kill, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--factor", type=float, default=3.0, help="see --elastic above")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/m3i-kill"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="for kills and outcome, as JSON")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    whole, run = args.folder / "whole", args.folder / "killed"
    for old in (whole, run):
        shutil.rmtree(old, ignore_errors=True)
    configuration = prepare(args.folder, 3 * args.kills + 4, args.elastic)
    import_everything()

    chance, kills = random.Random(args.seed), list[Kill]()
    start(configuration, whole, args.ranks).finish(3 * PATIENCE)
    others = [args.folder / f"whole-{n}" for n in (1, 2, 3) if args.elastic and n != args.ranks]
    for other in others:
        shutil.rmtree(other, ignore_errors=True)
        start(configuration, other, int(other.name[-1])).finish(3 * PATIENCE)
    print(("{:>4} {:>6} {:>5} {:>6} {:>6} {:>5} {:>5} {:>7}  others").format(
        "kill", "aim", "ranks", "victim", "saving", "steps", "saved", "seconds"
    ))  # fmt: skip
    while len(kills) < args.kills:
        ranks = chance.randint(1, 3) if args.elastic else args.ranks
        aim = chance.choice(["start", "step", "save", "save"])
        kill = kill_once(configuration, run, ranks, aim, chance)
        if kill is None:
            break
        kills.append(kill)
        print(
            f"{len(kills):4} {kill.aim:>6} {kill.ranks:5} {kill.victim:6} "
            f"{'yes' if kill.saving else 'no':>6} {kill.seen:5} {kill.saved:5} "
            f"{kill.seconds:7.1f}  {kill.survivors}",
            flush=True,
        )
    start(configuration, run, args.ranks).finish(3 * PATIENCE)

    outcome = (
        compare_within_rounding(run, whole, others, args.factor)
        if args.elastic
        else compare(run, whole)
    )
    print(f"{len(kills)} kills, {sum(k.saving for k in kills)} of them while saving", end="; ")
    print(*outcome.words, sep="\n")
    if args.out:
        report = {
            "command": "python benchmarks/kill.py" + " --elastic" * args.elastic
            + f" --kills {args.kills} --ranks {args.ranks} --seed {args.seed}",
            "passed": outcome.passed,
            "outcome": outcome.words,
            "kills": [kill._asdict() for kill in kills],
            "origin": origin(),
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(not outcome.passed)


if __name__ == "__main__":
    sys.exit(main())
