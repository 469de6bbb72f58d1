"""A month of failures in an hour: how much of it was training, and what it did to the weights.

    python benchmarks/month.py --hours 1 [--seed 0] [--folder /tmp/m3i-month] [--out FOLDER]
    python benchmarks/month.py --kinds "rank dies" "disk full"       a rehearsal: one of each

Trains a small network with the real program (`m3i_scale/train.py`) on two CPU ranks, started and
requeued by the real Slurm template with a stand-in for Slurm, and has the failures of a month of a
job on 1,024 GPUs strike it: the rates and causes that were published of 54 days of Llama 3, ten
kinds. `simulated/trace.py` holds the rates and says how time is mapped. Then it trains once more,
undisturbed.

The goals, exit code 1 if one is missed:

    effective   at least 97 % of the month trained. `m3i report` divides the hour; of its shares,
                start-up, steps made again, stalls, queueing and down are taken as they are, a
                second for half a minute, and so are delays by slow ranks. The rest of the 30 days,
                most of which was left out between failures, trains as well as the steps that count
                have here, waits for checkpoints taken off. The ratio of the hour itself, nothing
                scaled, and that without waits for data are printed beside it.
    exact       final weights, moments, averages, generators and counters, and all figures of all
                steps are those of the undisturbed run, bit for bit
    explained   `m3i report` names the cause of each injected failure (killed: which rank; stalled:
                where; a checkpoint that was not written, or passed over; which rank was slow), and
                no attempt ended without one

A rehearsal has no month, and no goal for the effective time. Needs a file system of its own that
can be full: root, or user namespaces (`unshare`). Takes about `--hours` on two free cores, both
runs together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from forks import wait_for
from kill import differences, prepare
from origin import origin
from simulated import page
from simulated.inject import Injected, inject
from simulated.matching import GOAL, effective_ratio, match, unexpected
from simulated.slurm import REQUEUED, Job
from simulated.trace import (
    KINDS,
    SCALE,
    STALL_MINUTES,
    Failure,
    Month,
    checkpoint_steps,
    draw,
    one_of_each,
)
from tqdm import tqdm

RANKS = 2
STEP_SECONDS = 0.25  # of a usual step on two free cores; sets how many steps stand for a minute
REHEARSED_SECONDS = 3.0  # the same in a rehearsal, which is made short by it
DISK = "768m"
IN_NAMESPACE = "M3I_MONTH_NAMESPACE"
PATIENCE = 600.0
INTERRUPTING = {kind.name for kind in KINDS if kind.interrupts}


def configure(folder: Path, runs: Path, month: Month, step_seconds: float) -> Path:
    """The workload of `kill.py` with the batch and the intervals of the month; its path."""
    tree = yaml.safe_load(prepare(folder, month.steps, elastic=False).read_text())
    tree["folder"] = str(runs)
    tree["optimizer"] |= {"global_batch_size": 32, "max_micro_batch": 16}
    tree["data"]["workers"] = 1
    tree["engine"] = {"timeout_minutes": 2, "stall_minutes": STALL_MINUTES / SCALE / 60}
    tree["checkpoint"] = {"every": f"{checkpoint_steps(step_seconds)} steps", "keep_last": 2}
    path = folder / "month.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# ------------------------------------------------------------------------------------- the disk


def enter_namespace() -> None:
    """Start this program again where it may mount, if it may not here.

    Raises:
        SystemExit: it may nowhere.
    """
    probe = Path(f"/tmp/m3i-month-{os.getpid()}")
    probe.mkdir()
    try:
        mount(probe)
        subprocess.run(["umount", str(probe)], check=True)
    except OSError as error:
        if IN_NAMESPACE in os.environ or shutil.which("unshare") is None:
            raise SystemExit(
                f"a small file system cannot be mounted ({error}), and the disk must be full at "
                "times: run this as root, or where user namespaces are allowed"
            ) from None
        again = ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe("unshare", again, os.environ | {IN_NAMESPACE: "yes"})
    finally:
        probe.rmdir()


def mount(folder: Path) -> None:
    """A small file system.

    Raises:
        OSError: that is not allowed.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder on a file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


# ---------------------------------------------------------------------------------- one training


class Progress:
    """How many steps a run has made, read from its metrics as they grow; and a bar."""

    def __init__(self, run: Path, total: int) -> None:
        self._path, self._read = run / "metrics.jsonl", 0
        self.done, self._moved = 0, time.monotonic()
        self.bar = tqdm(total=total, unit="step", desc=run.name, dynamic_ncols=True)

    def __call__(self) -> int:
        """Read what has been added."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size < self._read:  # a torn line was cut off
                self._read = 0
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
            self._read += len(whole) + bool(whole)
            for line in whole.splitlines():
                self.done = max(self.done, json.loads(line)["step"] + 1)
        if self.done > self.bar.n:
            self._moved = time.monotonic()
            self.bar.update(self.done - self.bar.n)
        return self.done

    def stands_still(self) -> bool:
        """Whether nothing new has come for very long."""
        self()
        return time.monotonic() - self._moved > PATIENCE


def train(job: Job, failures: list[Failure], steps: int) -> list[Injected]:
    """One run through its failures, until it has finished.

    Raises:
        SystemExit: the job has given up, or nothing happens any more.
    """
    left, done, progress = list(failures), list[Injected](), Progress(job.run, steps)
    try:
        job.start()
        while job.code != 0:
            if job.code == REQUEUED:
                job.start()
            elif job.code is not None:
                raise SystemExit(f"the job has given up; {job.log} says:\n{tail(job.log)}")
            elif progress.stands_still():
                raise SystemExit(f"no step for {PATIENCE:g} s; see {job.run}/logs")
            elif left and progress() >= left[0].step and is_training(job):
                failure = left.pop(0)
                progress.bar.set_postfix_str(f"{failure.number}: {failure.kind}")
                done.append(inject(failure, job, STEP_SECONDS, progress))
                if failure.kind in INTERRUPTING:
                    wait_for(lambda: job.code is not None, PATIENCE)
            else:
                time.sleep(0.05)
        progress()
        return done
    finally:
        job.end()
        progress.bar.close()


def is_training(job: Job) -> bool:
    """Whether the attempt has made a step: before, there is nobody to strike."""
    events = job.run / "events.jsonl"
    if len(job.tasks()) < RANKS or not events.exists():
        return False
    last = next((line for line in reversed(events.read_text().splitlines()) if '"start"' in line),
                "{}")  # fmt: skip
    start = json.loads(last)
    if start.get("restart") != job.restart:
        return False
    lines = (job.run / "metrics.jsonl").read_bytes().splitlines()[-1:]
    return bool(lines) and f'"{start["attempt"]}"'.encode() in lines[0]


def tail(path: Path) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-25:])


# --------------------------------------------------------------------------------------- program


def judge(
    run: Path, whole: Path, month: Month, done: list[Injected], timed: bool
) -> dict[str, Any]:
    """What came of it, goal by goal."""
    from m3i_scale.report.read import read_trace
    from m3i_scale.report.summary import summarise

    report, accounts = summarise(read_trace(run), time.time())
    matches = match(report, done)
    problems = list(differences(run, whole))[:20]
    effective = effective_ratio(report, month.minutes) if timed else None
    strangers = unexpected(report, done)
    return {
        "report": report,
        "accounts": accounts,
        "matches": matches,
        "effective": effective,
        "differences": problems,
        "unexpected": strangers,
        "goals": {
            **({"effective": bool(effective["ratio"] >= GOAL)} if effective else {}),
            "exact": not problems,
            "explained": all(one.explained for one in matches) and not strangers,
        },
    }


def main() -> int:
    """Train twice, disturb, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0, help="of this benchmark; each a month")
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], metavar="KIND",
                        help="one failure of each of these instead")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/m3i-month"))
    parser.add_argument("--out", type=Path, help="write pages and figures into this folder")
    args = parser.parse_args()
    enter_namespace()
    begun, folder = time.time(), args.folder.resolve()
    shutil.rmtree(folder / "month", ignore_errors=True)
    (folder / "month").mkdir(parents=True)
    if args.kinds:
        step_seconds = REHEARSED_SECONDS
        month = one_of_each(args.kinds, args.seed, step_seconds, RANKS)
    else:
        step_seconds = STEP_SECONDS
        month = draw(args.hours, args.seed, step_seconds, RANKS)
    print(f"{len(month.failures)} failures, {month.steps} steps", flush=True)
    with small_disk(folder / "disk") as runs:
        configuration = configure(folder, runs, month, step_seconds)
        disturbed = Job(folder / "month", runs, configuration, "disturbed", RANKS)
        done = train(disturbed, month.failures, month.steps)
        whole = Job(folder / "month", runs, configuration, "undisturbed", RANKS)
        train(whole, [], month.steps)
        found = judge(disturbed.run, whole.run, month, done, timed=not args.kinds)
        kinds = ("--kinds " + " ".join(f'"{kind}"' for kind in args.kinds)) if args.kinds else ""
        words = kinds or f"--hours {args.hours:g}"
        command = f"python benchmarks/month.py {words} --seed {args.seed}"
        tree = page.tree(found, month, command, time.time() - begun) | {"origin": origin()}
        print(page.markdown(tree), end="")
        if args.out:
            page.write(args.out, tree, found)
        if not all(found["goals"].values()):
            kept = folder / "failed"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(runs, kept, symlinks=True)
            print(f"a goal was missed; both runs are in {kept}")
    return int(not all(found["goals"].values()))


if __name__ == "__main__":
    sys.exit(main())
