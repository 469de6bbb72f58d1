"""The attempts of a run: when each was queued, launched, training and over, and why it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m3i_scale.report.causes import UNKNOWN, cause_of
from m3i_scale.report.read import COLUMN, FIGURES, Rows, Trace

RUNNING = "running"


@dataclass
class Attempt:
    """One start of the ranks."""

    name: str
    parts: list[tuple[str, float]] = field(default_factory=list)  # of the start-up, and their begin
    begins: list[tuple[int, float]] = field(default_factory=list)  # step, time; later: rollbacks
    rows: Rows = field(default_factory=lambda: np.empty((0, len(FIGURES))))
    ranks: int | None = None
    hosts: list[str] = field(default_factory=list)
    job: str | None = None
    restart: int | None = None  # of the job
    submitted: float | None = None  # to the scheduler
    end: float = math.nan
    told_end: bool = False  # by rank 0 itself
    told: dict[int, dict[str, Any]] = field(default_factory=dict)  # last words, by rank
    asked: str = ""  # by what it was asked to stop
    launcher: str = ""  # what it said of the rank that failed first
    cause: str = UNKNOWN
    words: str = ""
    closing_wait: float = 0.0  # seconds for checkpoints after the last step
    run: str | None = None  # identity of the run that it trained
    last_sign_before: float | None = None  # of the attempt before, if that was killed
    faults: list[dict[str, Any]] = field(default_factory=list)  # wrong results of the hardware
    checkpoints: list[dict[str, Any]] = field(default_factory=list)  # that do not count

    @property
    def start(self) -> float:
        """When it was launched."""
        return self.parts[0][1] if self.parts else self.begins[0][1]

    @property
    def process_start(self) -> float:
        """When rank 0 itself started."""
        return next((t for part, t in self.parts if part != "launch"), self.start)

    @property
    def last(self) -> float:
        """The last moment of which there is a record of its own, but for its end."""
        return max(t for _, t in (*self.parts, *self.begins, *self._last_step))

    @property
    def _last_step(self) -> list[tuple[int, float]]:
        return [(0, float(self.rows[-1, COLUMN["time"]]))] if len(self.rows) else []


def attempts_of(trace: Trace, now: float) -> list[Attempt]:
    """The attempts of the run that the folder holds, in the order of their starts.

    An attempt that did not get as far as training is counted to the run that trained next. Lines
    that do not name their attempt (of another version) are attempts without a start-up.

    Args:
        trace: the folder's lines.
        now: seconds since 1970; of a run that is going on.
    """
    found = _from_events(trace)
    for name, rows in trace.rows.items():
        if name in found:
            _add_rows(found[name], rows)
        else:  # the lines of its start are damaged, or another version wrote none
            parts = [rows] if name else _split(rows)
            found |= {f"{name}-{n}": _bare(name, part) for n, part in enumerate(parts)}
    ordered = sorted(found.values(), key=lambda attempt: attempt.start)
    chosen = _of_one_run(trace, ordered)
    floor = -math.inf
    for attempt, following in zip(chosen, [*chosen[1:], None], strict=False):
        _put_in_order(attempt, floor)
        _end(attempt, following, trace, now)
        floor = attempt.end
    return chosen


def _from_events(trace: Trace) -> dict[str, Attempt]:
    found: dict[str, Attempt] = {}
    for event in trace.events:
        attempt = found.setdefault(event["attempt"], Attempt(event["attempt"]))
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(attempt, event)
    for error in trace.errors:
        if error["attempt"] in found and error["event"] in ("end", "stalled"):
            _take_error(found[error["attempt"]], error)
    return {name: attempt for name, attempt in found.items() if attempt.parts or attempt.begins}


def _take_start(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.parts = event["parts"] or [("imports", event["time"])]
    attempt.ranks, attempt.hosts = event["ranks"], event["hosts"]
    attempt.job, attempt.submitted = event.get("job"), event["submitted"]
    attempt.restart, attempt.launcher = event.get("restart"), event["launcher"]
    attempt.last_sign_before = event["last_sign"]


def _take_part(attempt: Attempt, event: dict[str, Any]) -> None:
    if not attempt.begins:
        attempt.parts.append((str(event.get("part")), event["time"]))


def _take_begin(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.begins.append((event["step"], event["time"]))
    attempt.run = event["run"]


def _take_end(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.end, attempt.told_end = event["time"], True
    attempt.told[0] = event
    wait = event.get("checkpoint_wait_seconds", 0.0)
    attempt.closing_wait = float(wait) if isinstance(wait, int | float) else 0.0


def _take_asked(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.asked = str(event.get("words", "")) or "a signal"


def _take_error(attempt: Attempt, error: dict[str, Any]) -> None:
    """What another rank says: when rank 0 has not, it is a sign of the end."""
    attempt.told[error["rank"]] = error
    if not attempt.told_end:
        attempt.end = error["time"]


def _take_checkpoint(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.checkpoints.append({
        "time": event["time"],
        "step": event.get("step"),
        "what": "not written" if event["event"] == "unsaved" else event["event"],
        "words": str(event.get("words", "")),
    })  # fmt: skip


def _take_fault(attempt: Attempt, event: dict[str, Any]) -> None:
    nodes = event.get("nodes")
    attempt.faults.append({
        "time": event["time"],
        "step": event.get("step"),
        "nodes": [str(node) for node in nodes] if isinstance(nodes, list) else [],
        "words": str(event.get("words", "")),
    })  # fmt: skip


_HANDLERS = {
    "fault": _take_fault,
    "start": _take_start,
    "part": _take_part,
    "begin": _take_begin,
    "unsaved": _take_checkpoint,
    "passed over": _take_checkpoint,
    "asked": _take_asked,
    "stalled": _take_end,
    "end": _take_end,
}


def _add_rows(attempt: Attempt, rows: Rows) -> None:
    attempt.rows = rows
    if not attempt.begins:  # its line is damaged
        attempt.begins = _bare("", rows).begins


def _bare(name: str, rows: Rows) -> Attempt:
    """An attempt of which only its steps are known."""
    first = rows[0]
    seconds = first[COLUMN["step_seconds"]]
    began = first[COLUMN["time"]] - (0.0 if math.isnan(seconds) else seconds)
    return Attempt(name, begins=[(int(first[COLUMN["step"]]), began)], rows=rows)


def _split(rows: Rows) -> list[Rows]:
    """Steps in their order, cut where they go back: there a restart has repeated some."""
    steps = rows[:, COLUMN["step"]]
    return np.split(rows, np.flatnonzero(np.diff(steps) <= 0) + 1)


def _of_one_run(trace: Trace, found: list[Attempt]) -> list[Attempt]:
    """Without the attempts of runs that lay here before and were set aside.

    The last `begin` says which run the folder holds. What was set aside holds the events up to the
    start that set it aside, which is not of that run.
    """
    runs = [attempt.run for attempt in found if attempt.run is not None]
    if not runs:
        return found
    current, chosen = runs[-1], list[Attempt]()
    aside = trace.folder.resolve().parent.name == "set-aside"
    following = None if aside else current
    for attempt in reversed(found):
        following = attempt.run if attempt.run is not None else following
        if following == current and (attempt.name or _goes_on_from(attempt, found, current)):
            chosen.append(attempt)
    return chosen[::-1]


def _goes_on_from(attempt: Attempt, found: list[Attempt], current: str) -> bool:
    """Whether the run went on from steps of another version, and did not begin anew."""
    first = next(a for a in found if a.run == current)
    return not attempt.begins or first.begins[0][0] > attempt.begins[0][0]


def _put_in_order(attempt: Attempt, floor: float) -> None:
    """Let no time be before the one before it, nor before the end of the attempt before.

    A launcher outlives the attempts that it starts, and the clocks of two nodes may differ.
    """
    times = [time for _, time in (*attempt.parts, *attempt.begins)]
    in_order = np.maximum.accumulate([floor, *times])[1:].tolist()
    launched = len(attempt.parts)
    attempt.parts = [(p, t) for (p, _), t in zip(attempt.parts, in_order, strict=False)]
    begun = zip(attempt.begins, in_order[launched:], strict=True)
    attempt.begins = [(step, time) for (step, _), time in begun]
    if attempt.begins:
        column = attempt.rows[:, COLUMN["time"]]
        column[:] = np.maximum(column, attempt.begins[0][1])


def _end(attempt: Attempt, following: Attempt | None, trace: Trace, now: float) -> None:
    """Complete an attempt's end: from its own word, the lock, or the last that is known of it."""
    if not attempt.told_end:
        signs = [attempt.last, *([] if math.isnan(attempt.end) else [attempt.end])]
        if following is not None:
            signs += [following.last_sign_before or 0.0]
        elif trace.owner is not None:
            renewed, alive = trace.owner
            signs += [now if alive else renewed]
            attempt.cause = RUNNING if alive and not attempt.told else UNKNOWN
        attempt.end = max(signs)
    if attempt.cause != RUNNING:
        attempt.cause, attempt.words = cause_of(
            attempt.told, attempt.ranks, attempt.hosts, attempt.launcher, attempt.asked
        )
    attempt.end = max(attempt.end, attempt.last)
    if following is not None:
        attempt.end = max(attempt.last, min(attempt.end, following.process_start))
