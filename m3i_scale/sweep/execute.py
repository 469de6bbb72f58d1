"""Runs cells: a process for training and one for evaluation, each with a log file."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from tqdm import tqdm

import m3i_scale
from m3i_scale.config import dump_config
from m3i_scale.engine.stop import STOPPED
from m3i_scale.ranks import torchrun
from m3i_scale.sweep import progress
from m3i_scale.sweep.grid import Cell
from m3i_scale.sweep.spec import Evaluation, Sweep

TRAIN = Path(m3i_scale.__file__).parent / "train.py"


class Outcome(NamedTuple):
    """How the work on one cell ended: "finished", "skipped", "taken", "stopped" or "failed"."""

    cell: Cell
    what: str
    why: str = ""


class Stopper:
    """Passes a signal on to the process that is running, and remembers that it came."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.stopped = False
        self.process: subprocess.Popen[bytes] | None = None
        self._before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self.process is not None:
            self.process.send_signal(number)

    def restore(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_cells(sweep: Sweep, chosen: Sequence[Cell]) -> list[Outcome]:
    """Run the cells that are not finished, one after another; a failing one stops no other.

    Several processes may work on one sweep: each passes over the cells that another one has taken.
    """
    outcomes: list[Outcome] = []
    stopper = Stopper()
    try:
        with tqdm(total=len(chosen), unit="run", desc=sweep.name) as bar:
            for cell in chosen:
                bar.set_postfix_str(cell.name)
                outcome = _run_cell(sweep, cell, stopper)
                outcomes.append(outcome)
                bar.update()
                if outcome.what == "failed":
                    bar.write(f"{cell.name} failed: {outcome.why}", file=sys.stderr)
                if stopper.stopped:
                    break
    finally:
        stopper.restore()
    return outcomes


def _run_cell(sweep: Sweep, cell: Cell, stopper: Stopper) -> Outcome:
    if progress.is_finished(cell, sweep.evaluation):
        return Outcome(cell, "skipped")
    path = log_file(sweep, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock lives as long as this process or the one it has started, whose output goes there.
    with path.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Outcome(cell, "taken")
        commands = [] if progress.is_trained(cell) else [train_command(sweep, cell)]
        commands.append(evaluate_command(cell, sweep.evaluation))
        for command in commands:
            code = _call(command, log, stopper)
            if stopper.stopped:
                return Outcome(cell, "stopped")
            if code:
                return Outcome(cell, "failed", _reason(path, code))
        progress.mark_finished(cell, sweep.evaluation)
    return Outcome(cell, "finished")


def log_file(sweep: Sweep, cell: Cell) -> Path:
    """Where a cell's training and evaluation write."""
    return sweep.own_folder / "logs" / f"{cell.name}.log"


def _call(command: Sequence[str], log: IO[bytes], stopper: Stopper) -> int:
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    if stopper.stopped:
        return STOPPED
    # A new session: Ctrl-C reaches the process once, through the stopper.
    stopper.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return stopper.process.wait()
    finally:
        if stopper.process.poll() is None:  # an exception from elsewhere: leave nothing running
            stopper.process.kill()
        stopper.process = None


def train_command(sweep: Sweep, cell: Cell) -> list[str]:
    """Start or resume the training of a cell; writes the configuration file it names."""
    file = sweep.own_folder / "cells" / f"{cell.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(dump_config(cell.config))
    partial.rename(file)
    launch = torchrun(sweep.ranks) if sweep.ranks > 1 else [sys.executable]
    return [*launch, str(TRAIN), "--config", str(file), "--resume", "auto"]


def evaluate_command(cell: Cell, evaluation: Evaluation) -> list[str]:
    """Evaluate a trained cell."""
    spec = evaluation
    gallery = spec.gallery or [source.index for source in cell.config.data.sources]
    command = [sys.executable, "-m", "m3i_scale.cli", "eval", "--run", str(cell.folder)]
    command += ["--gallery", *gallery, "--queries", *spec.queries, "--which", spec.which]
    command += ["--neighbours", str(spec.neighbours), "--batch", str(spec.batch)]
    command += ["--subject", spec.subject, "--category", spec.category]
    command += ["--device", cell.config.engine.device]
    command += ["--limit", str(spec.limit)] if spec.limit else []
    command += ["--probe"] if spec.probe else []
    return command if cell.config.logging.pictures else [*command, "--no-pictures"]


def _reason(log: Path, code: int) -> str:
    """What went wrong: the last line of the log, and where the rest is."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1].strip() if lines else 'no output'} ({ended}; {log})"
