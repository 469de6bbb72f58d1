"""From a kill to the next step: how long a restart takes, by part, on 1, 2 and 4 CPU ranks.

    python benchmarks/restart.py [--ranks 1 2 4] [--repeats 3] [--folder DIR] [--out FILE.json]

Trains the small network of `kill.py` for a step, stops it with a checkpoint written, and starts it
again as a scheduler does: a new Python for every rank. The parts are those of events.jsonl, which
`m3i report` shows of any run; "first step" ends with the first line of metrics.jsonl.

Wall seconds are the median over repeats. Processor seconds are of all ranks' processes, their
workers included: on an idle machine with a core for each rank a restart cannot take longer than
those of one rank, on a busy one it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forks import free_port, wait_for
from kill import prepare

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600.0


def start(configuration: Path, run: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The training program as a scheduler starts it."""
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "m3i_scale" / "train.py"), "--config", str(configuration)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(f"{run}.rank-{rank}.log", "a") as log:
            processes.append(
                subprocess.Popen(
                    [*command, f"run={run.name}"],
                    env=os.environ | variables | place,
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def restart(configuration: Path, run: Path, ranks: int) -> tuple[float, float]:
    """Start, wait for a step more, stop with a checkpoint; wall and processor seconds."""
    before, used = len(steps_of(run)), resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.time()
    processes = start(configuration, run, ranks)
    there = wait_for(
        lambda: len(steps_of(run)) > before or any(p.poll() for p in processes), PATIENCE
    )
    wall = steps_of(run)[before]["time"] - begun if len(steps_of(run)) > before else 0.0
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes = [process.wait(PATIENCE) for process in processes]
    if not there or not wall or set(codes) - {0, 85}:
        logs = [Path(f"{run}.rank-{r}.log").read_text()[-2000:] for r in range(ranks)]
        raise SystemExit("\n".join([f"exit codes {codes}", *logs]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return wall, busy


def parts_of(run: Path) -> dict[str, float]:
    """Seconds of each part of the last attempt's start-up."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    name = events[-1]["attempt"]
    own = [event for event in events if event["attempt"] == name]
    marks = [(str(part), float(at)) for part, at in own[0]["parts"]]
    marks += [(event["part"], event["time"]) for event in own if event["event"] == "part"]
    marks += [("first step", event["time"]) for event in own if event["event"] == "begin"]
    end = min(step["time"] for step in steps_of(run) if step["attempt"] == name)
    found: dict[str, float] = {}
    for (part, at), (_, after) in zip(marks, [*marks[1:], ("", end)], strict=True):
        found[part] = found.get(part, 0.0) + max(0.0, after - at)
    return found


def measure(folder: Path, ranks: int, repeats: int) -> dict[str, Any]:
    """The first start and the median restart on that many ranks."""
    configuration, run = prepare(folder, 1000, False), folder / f"on-{ranks}"
    shutil.rmtree(run, ignore_errors=True)
    first = restart(configuration, run, ranks)
    found = []
    for _ in range(repeats):
        wall, busy = restart(configuration, run, ranks)
        found.append({"wall": wall, "processor": busy, **parts_of(run)})
    names = list(dict.fromkeys(name for one in found for name in one))
    median = {name: statistics.median(one.get(name, 0.0) for one in found) for name in names}
    return {
        "ranks": ranks,
        "first_start": {"wall": first[0], "processor": first[1]},
        "restart": {name: round(value, 2) for name, value in median.items()},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["restart"]))
    lines = [
        f"`{report['command']}`; {report['cores']} cores, load before {report['load']:.1f}. Seconds"
        ", median of the restarts; the parts add up to the wall time of rank 0.",
        "",
        f"| ranks | {' | '.join(names)} | first start |",
        "| ---: |" + " ---: |" * (len(names) + 1),
    ]
    for row in report["rows"]:
        cells = [f"{row['restart'].get(name, 0.0):.1f}" for name in names]
        lines.append(f"| {row['ranks']} | {' | '.join(cells)} | {row['first_start']['wall']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the runs there")
    parser.add_argument("--out", type=Path, help="write the figures there, and a page beside it")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [measure(folder, ranks, args.repeats) for ranks in args.ranks]
    ranks = " ".join(map(str, args.ranks))
    report = {
        "command": f"python benchmarks/restart.py --ranks {ranks} --repeats {args.repeats}",
        "cores": os.cpu_count(), "machine": platform.processor() or platform.machine(),
        "load": load, "rows": rows,
    }  # fmt: skip
    print(markdown(report), end="")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
