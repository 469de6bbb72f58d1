"""Part 2: the kernels' tests, natively on a GPU; one row of counts and one for each failure."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import rows

WORKERS = 2 if rows.REHEARSE else 6
# Everything is collected; interpreted on a CPU only what ends at once is run.
CHOICE = ["-k", "refuses or reported or unknown or its_own_check"] if rows.REHEARSE else []


def main() -> int:
    """Run pytest and account for it; pytest's exit code."""
    report = rows.FOLDER / "kernel_tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(WORKERS), "--maxprocesses", str(WORKERS), "-m", "not cpu_only", *CHOICE]
    command += ["--confcutdir", "tests/kernels", "--timeout", "100", f"--junitxml={report}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=rows.ROOT, env=environment)
    account(report)
    return done.returncode


def account(report: Path) -> None:
    """Write the rows of a JUnit report."""
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    for case in suite.iter("testcase"):
        for problem in [*case.iter("failure"), *case.iter("error")]:
            name = f"{case.get('classname')}.{case.get('name')}"
            rows.write("tests", name, ok=False, message=(problem.get("message") or "")[:400])
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    rows.write("tests", "counts", ok=not bad and passed > 0, passed=passed, **counts)


if __name__ == "__main__":
    sys.exit(main())
