"""Part 6: a step at 160 ranks without 160 GPUs: `benchmarks/host_time.py`, which sends nothing.

    python host.py SECONDS     ends by itself before that many have passed

Side by side: InternImage-H in full width on the GPU (seconds by the clock: what a rank of 160 takes
where the network takes no time), and in narrow layers on CPU cores (the host's share alone).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rows

PROGRAM = rows.ROOT / "benchmarks" / "host_time.py"
MARGIN = 4  # seconds for the rows
ON_GPU = ["--device", "cuda", "--full", "--micro-batch", "128"]
RUNS = {
    "160 ranks, full width": (160, ON_GPU),
    "160 ranks": (160, []),
    "1 rank": (1, []),
}
REHEARSED = {"8 ranks": (8, ["--config", "configs/pretrain_vit_b16_imagenet.yaml"])}


def main(arguments: list[str]) -> int:
    """Run all, write a row of each; 1 where one failed."""
    if not PROGRAM.exists():
        print(f"error: there is no {PROGRAM}")
        return 1
    end = rows.end_of(arguments[0], MARGIN)
    started = {}
    for name, (ranks, more) in (REHEARSED if rows.REHEARSE else RUNS).items():
        output = rows.FOLDER / f"host_{name.replace(' ', '_').replace(',', '')}.json"
        command = [sys.executable, str(PROGRAM), "--ranks", str(ranks), "--steps", "3", "--json"]
        with output.open("w") as file:
            process = subprocess.Popen([*command, *more], cwd=rows.ROOT, stdout=file)
        started[name] = (process, output, ranks)
    return max(account(name, *one, end) for name, one in started.items())


def account(name: str, process: Any, output: Path, ranks: int, end: float) -> int:
    """Wait for one run and write its row."""
    note = ""
    try:
        process.wait(max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        note = "stopped by the time limit"
    text = output.read_text()
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        found = {"error": note or text[-300:] or f"exit code {process.returncode}"}
    ok = "seconds_per_step" in found
    found["ran_on"] = found.pop("device", None)  # a row's device is the GPU of the session
    rows.write("host", name, **{"ranks": ranks, **found, "ok": ok})
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
