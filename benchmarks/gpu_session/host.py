"""Part 5: host time of a step at 160 ranks, on a process group that sends nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import rows

PROGRAM = rows.ROOT / "benchmarks" / "host_time.py"
RANKS = (8,) if rows.REHEARSE else (1, 160)


def main() -> int:
    """Run `benchmarks/host_time.py` for each number of ranks; 1 where one failed."""
    if not PROGRAM.exists():
        print(f"error: there is no {PROGRAM}")
        return 1
    return max(measure(ranks) for ranks in RANKS)


def measure(ranks: int) -> int:
    """One row of its figures."""
    command = [sys.executable, str(PROGRAM), "--ranks", str(ranks), "--steps", "4", "--json"]
    if rows.REHEARSE:
        command += ["--backbone", "vit_b16"] if "--backbone" in _help() else []
    done = subprocess.run(command, cwd=rows.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {"error": done.stdout[-400:]}
    ok = done.returncode == 0 and "seconds_per_step" in found
    rows.write("host", f"{ranks} ranks", ranks=ranks, ok=ok, **found)
    return 0 if ok else 1


def _help() -> str:
    return rows.output(sys.executable, str(PROGRAM), "--help")


if __name__ == "__main__":
    sys.exit(main())
