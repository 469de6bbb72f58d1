"""Part 2: the kernels' tests, natively on a GPU; one row of counts and one for each failure.

This module is also the plugin that notes each test as it ends: tests that are stopped by the time
limit have told what they found before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import rows

WORKERS = 2 if rows.REHEARSE else 6
MARGIN = 4  # seconds for the rows
# Everything is collected; interpreted on a CPU only what ends at once is run.
CHOICE = ["-k", "refuses or reported or unknown or its_own_check"] if rows.REHEARSE else []
NOTES = rows.FOLDER / "kernel_tests.jsonl"


def pytest_runtest_logreport(report: Any) -> None:
    """Note what a test's call, or a failing fixture, has come to; workers' reports arrive too."""
    controls = "PYTEST_XDIST_WORKER" not in os.environ
    if controls and (report.when == "call" or report.outcome != "passed"):
        message = str(report.longrepr)[-1500:] if report.outcome == "failed" else ""
        note = {"test": report.nodeid, "outcome": report.outcome, "message": message}
        with NOTES.open("a") as file:
            file.write(json.dumps(note | {"seconds": report.duration}) + "\n")


def main(arguments: list[str]) -> int:
    """Run pytest for at most so many seconds and account for it; its exit code, 124 if stopped."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "kernel_tests", "-n", str(WORKERS), "-m", "not cpu_only", *CHOICE]
    command += ["--confcutdir", "tests/kernels", "--timeout", "90"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    limit = rows.end_of(arguments[0], MARGIN) - time.monotonic()
    try:
        code = subprocess.run(command, cwd=rows.ROOT, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 124
    account(NOTES, code)
    return code


def account(notes: Path, code: int) -> None:
    """Write the rows of all tests that have ended."""
    ended = rows.read(notes)
    for note in ended:
        if note["outcome"] == "failed":
            message = note["message"]
            rows.write("tests", note["test"], ok=False, message=message[-500:])
    counts = Counter(note["outcome"] for note in ended)
    slowest = sorted(ended, key=lambda note: -note["seconds"])[:5]
    rows.write(
        "tests",
        "counts",
        ok=code == 0 and counts["passed"] > 0,
        stopped=code == 124,
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        slowest={note["test"]: round(note["seconds"], 1) for note in slowest},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
