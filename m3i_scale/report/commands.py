"""The command `m3i report`."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3i_scale import paths

DESCRIPTION = """Say where the time of a run went, and what each interruption cost.

Writes report.md, report.png and report.json into the run's folder, or into --out, and prints the
page. Works on a run that goes on, was killed, lost lines, or changed its number of ranks; it only
reads what the run has written. docs/operations.md says what each share means."""


def register(subparsers: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`; it sets `run(args) -> int`."""
    parser = subparsers.add_parser(
        "report",
        help="where the time of a run went: training, start-ups, waits, interruptions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write here (default: RUN)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i report`."""
    from m3i_scale.report import page, picture, read, summary

    trace = read.read_trace(options.folder)
    report, accounts = summary.summarise(trace, time.time())
    out = options.out or options.folder
    paths.require_writable(out)
    text = page.markdown(report, "report.png")
    _replace(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    _replace(
        out / "report.png",
        lambda path: picture.save_picture(path, accounts, report["shares"], report["evaluations"]),
    )
    _replace(out / "report.md", lambda path: path.write_text(text))
    print(text, end="")
    print(f"Written to {out / 'report.md'}, report.png and report.json")
    return 0


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, with a name of its own: others may look at the same run."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
