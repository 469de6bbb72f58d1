"""The lines of a run folder: events, and the figures of each step, whatever is damaged of them."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_scale.engine import events, lock

METRICS = "metrics.jsonl"
# Figures of a step, in the order of the columns of `Rows`, and where a line of metrics.jsonl has
# them. The first two must be there; the others are NaN where another version did not write them.
# All ranks wait for the one that waits longest for its data.
FIGURES: dict[str, tuple[str, ...]] = {
    "step": ("step",),
    "time": ("time",),
    "step_seconds": ("step_seconds",),
    "data_wait": ("machine/longest_data_wait_seconds", "data_wait_seconds"),
    "checkpoint_wait": ("checkpoint_wait_seconds",),
    "evaluation": ("evaluation_seconds",),
    "loss": ("loss/total",),
    "slowest_rank": ("machine/slowest_rank",),
    "slowest_seconds": ("machine/slowest_rank_seconds",),
    "slowest_ratio": ("machine/slowest_rank_ratio",),
    "device_rank": ("machine/slowest_device_rank",),
    "device_seconds": ("machine/slowest_device_seconds",),
    "device_ratio": ("machine/slowest_device_ratio",),
}
EVALUATION = "evaluation/"  # what the names of an evaluation's figures begin with
COLUMN = {name: number for number, name in enumerate(FIGURES)}
# Where the Slurm templates keep what srun said of an attempt, and how it says that a rank failed.
LAUNCHER_LOG, MOST_BYTES = "srun.log", 1 << 16
_FAILED_TASK = re.compile(r"tasks? \d[\d,-]*: .*")
_RANK_FILE = re.compile(r"events-rank-(\d{1,9})\.jsonl")
_MOST_RANKS = 1_000_000  # of a run; they are listed one by one
_END_OF_TIME = 1e11  # seconds since 1970: what is beyond is no date that can be written
Rows = NDArray[np.float64]  # (steps, figures), in the order of time


class ReportError(ValueError):
    """There is nothing to report of."""

    for_users = True


@dataclass
class Trace:
    """What a run folder says."""

    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)  # of rank 0, in their order
    errors: list[dict[str, Any]] = field(default_factory=list)  # of other ranks
    rows: dict[str, Rows] = field(default_factory=dict)  # by attempt; "": does not say which
    # Figures of evaluations, by step and name; of a step that was made again, the last ones.
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    damaged: dict[str, list[int]] = field(default_factory=dict)  # numbers of lines, by file
    owner: tuple[float, bool] | None = None  # last sign of life, and whether it lives


def read_trace(folder: Path) -> Trace:
    """Everything that a run folder says of its time.

    Steps of a branch that was set aside are of the run's time, too; their lines are in the folders
    below set-aside/.

    Raises:
        ReportError: the folder holds neither events nor metrics.
    """
    files = [folder / METRICS, *sorted(folder.glob(f"set-aside/*/{METRICS}"))]
    if not any(path.is_file() for path in (*files, folder / events.FILE)):
        raise ReportError(
            f"{folder} holds neither {events.FILE} nor {METRICS}; name the folder of a run, "
            "runs/NAME"
        )
    trace = Trace(folder, owner=lock.sign_of_life(folder))
    trace.events = list(_lines(folder / events.FILE, trace, _event))
    for event in trace.events:
        if event["event"] == "start":
            event["launcher"] = _said_by_launcher(folder, event.get("job"), event.get("restart"))
    for path in sorted(folder.glob(events.RANK_FILES)):
        if rank := _RANK_FILE.fullmatch(path.name):
            trace.errors += ({**e, "rank": int(rank[1])} for e in _lines(path, trace, _event))
    found: dict[str, array[float]] = {}
    for path in filter(Path.is_file, files):
        for attempt, figures, evaluation in _lines(path, trace, _step):
            found.setdefault(attempt, array("d")).extend(figures)
            if evaluation and path.parent == folder:  # not of a branch that was set aside
                trace.evaluations[int(figures[0])] = evaluation
    for attempt, values in found.items():
        rows = np.array(values).reshape(-1, len(FIGURES))
        # A branch's file begins with a copy of the lines before it.
        _, chosen = np.unique(rows[:, :2], axis=0, return_index=True)
        rows = rows[chosen]
        trace.rows[attempt] = rows[np.argsort(rows[:, COLUMN["time"]], kind="stable")]
    return trace


def _said_by_launcher(folder: Path, job: Any, restart: Any) -> str:
    """What srun said of the first task that failed; empty if it is not known."""
    name = f"{job}-{restart}"
    if not isinstance(restart, int) or not re.fullmatch(r"[\w-]+", name):
        return ""
    try:
        with (folder / "logs" / name / LAUNCHER_LOG).open("rb") as file:
            text = file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    found = _FAILED_TASK.search(text)
    return f"srun: {found[0].strip()}" if found else ""


def _lines(path: Path, trace: Trace, read: Callable[[Any], Any]) -> Iterator[Any]:
    """What `read` makes of each line; lines that it refuses are noted as damaged."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read(json.loads(line))
            except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
                name = str(path.relative_to(trace.folder))
                trace.damaged.setdefault(name, []).append(number)


def _number(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _moment(value: Any) -> float:
    """Seconds since 1970; raises as `_number`."""
    if not 0 <= _number(value) < _END_OF_TIME:
        raise ValueError(value)
    return float(value)


def _step(values: Any) -> tuple[str, list[float], dict[str, float]]:
    """Attempt, figures, and those of an evaluation, of a line of metrics.jsonl."""
    step, _ = _number(values["step"]), _moment(values["time"])
    if step < 0 or step != int(step):
        raise ValueError(step)
    attempt = values.get("attempt", "")
    if not isinstance(attempt, str):
        raise TypeError(attempt)
    evaluation = {
        name.removeprefix(EVALUATION): _figure(values, (name,))
        for name in values
        if name.startswith(EVALUATION)
    }
    known = {name: value for name, value in evaluation.items() if math.isfinite(value)}
    return attempt, [_figure(values, keys) for keys in FIGURES.values()], known


def _figure(values: dict[str, Any], keys: tuple[str, ...]) -> float:
    for key in keys:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if math.isfinite(value) else math.nan
    return math.nan


def _event(values: Any) -> dict[str, Any]:
    """A line of events.jsonl, checked as far as others rely on it."""
    for name in ("event", "attempt"):
        if not isinstance(values[name], str):
            raise TypeError(values[name])
    found = {**values, "time": _moment(values["time"])}
    if values["event"] == "start":
        found["parts"] = [(str(part), _moment(began)) for part, began in values["parts"]]
        found["ranks"] = int(_number(values["ranks"]))
        if not 0 < found["ranks"] <= _MOST_RANKS:
            raise ValueError(values["ranks"])
        found["hosts"] = [str(host) for host in values["hosts"]]
        for name in ("submitted", "last_sign"):
            found[name] = None if values.get(name) is None else _moment(values[name])
    if values["event"] == "begin":
        found["step"] = int(_number(values["step"]))
        found["run"] = str(values["run"])
    return found
