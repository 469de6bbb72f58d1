"""The command `m3i demo`: from nothing to a table of what a small network has learned.

It needs no checkout and no data: the configuration is the package's, the images are drawn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

DESCRIPTION = """Draw data, pre-train a small network on two CPU ranks, and show what it learned.

Runs these commands one after the other, prints each, and stops at the first that fails; some
minutes on two cores. The data go to data_demo/ and the run to runs/demo/, below the folder that
you are in. The same command again goes on with an interrupted run.

  m3i glyphs; m3i tokenizer; deepspeed --module m3i_scale.train --config m3i:demo; m3i eval"""

CONFIG = "m3i:demo"
GLYPHS = Path("data_demo/glyphs")
TOKENIZER = Path("data_demo/tokenizer.json")
RANKS = 2
# One thread per process where two processes share two cores; GPUs are left alone.
CPU_RANKS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

M3I = (sys.executable, "-m", "m3i_scale.cli")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")


def register(subparsers: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`; it sets `run(args) -> int`."""
    parser = subparsers.add_parser(
        "demo",
        help="draw data, pre-train a small network on two CPU ranks, and show what it learned",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="changes to the configuration"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i demo`."""
    from m3i_scale.config import load_config

    folder = load_config(CONFIG, options.overrides).run_folder  # refuses mistakes at once
    code = execute_all("m3i demo", commands(folder, options.overrides))
    if code:
        return code
    print(f"Pictures, curves, checkpoint and logs: {folder}/")
    return 0


def commands(run_folder: Path, overrides: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The commands, and the variables that each needs."""
    text, category, held_out = (
        str(GLYPHS / f"{name}.parquet") for name in ("text", "category", "heldout")
    )
    return [
        ([*M3I, "glyphs", "--out", str(GLYPHS)], {}),
        ([*M3I, "tokenizer", text, "--vocab-size", "1000", "--out", str(TOKENIZER)], {}),
        (
            [*DEEPSPEED, "--num_accelerators", str(RANKS), "--module", "m3i_scale.train",
             "--config", CONFIG, *overrides],
            CPU_RANKS,
        ),
        (
            [*M3I, "eval", "--run", str(run_folder), "--subject", "character",
             "--category", "block", "--gallery", text, category, "--queries", held_out],
            {},
        ),
    ]  # fmt: skip


def execute_all(name: str, commands: Iterable[tuple[list[str], dict[str, str]]]) -> int:
    """Run commands until one fails; its exit code, or 0."""
    for command, variables in commands:
        code = execute(command, variables)
        if code:
            print(f"{name} ends here: the command above ended with {code}", file=sys.stderr)
            return code
    return 0


def execute(command: list[str], variables: dict[str, str]) -> int:
    """Run a command to its end and return its exit code.

    A signal to stop is the command's to obey: ranks save before they leave.
    """
    shown = [*(f"{name}={value}" for name, value in variables.items()), *map(shlex.quote, command)]
    print("$", " ".join(shown), flush=True)
    child = subprocess.Popen(command, env=os.environ | variables)

    def forward(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # the terminal has sent that to the whole group
            child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code  # as a shell says which signal it was
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
