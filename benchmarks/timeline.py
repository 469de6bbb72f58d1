"""Where the time of a profiled step goes: from a profiler's trace to a table of exclusive times.

The trace is the Chrome trace that `torch.profiler` exports. Every instant of the profiled steps is
given to exactly one category and one phase, so that the table adds up to the steps' time:

1. to the operation running on the device that started last (kernels; on a CPU, operators, where
   that is the innermost one), but to communication only where nothing else runs;
2. to "idle" where nothing runs.

The phase of a kernel is the one in which the host launched it; of an idle instant, the one in which
the host is.
"""

import bisect
import gzip
import heapq
import itertools
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

STEP = "m3i step"  # the annotation around one whole step
PHASE = "m3i phase: "  # prefix of the annotations inside it
INPUT, TARGETS, FORWARD, BACKWARD = "input", "targets", "forward", "backward"
OPTIMISER, TEACHER = "optimiser", "EMA"
PHASES = (INPUT, TARGETS, FORWARD, BACKWARD, OPTIMISER, TEACHER)
COMMUNICATION, IDLE = "communication", "idle"

# What runs in these phases is called after them, whatever kernel it is; communication apart.
_BY_PHASE = {INPUT: "augmentation, mixing", OPTIMISER: "optimiser", TEACHER: "EMA"}
_COMMUNICATION = r"nccl|rccl|c10d::|gloo:"
_BY_NAME = (
    ("dcnv3", r"dcnv3|grid_sampler"),
    ("attention", r"flash|fmha|attention"),
    ("convolution", r"conv|wgrad|dgrad|fprop|winograd|nchwtonhwc|nhwctonchw"),
    ("GEMM", r"gemm|cublas|cutlass|nvjet|cijk|splitk|aten::(add)?mm|aten::(baddb|b)mm"),
    ("copies", r"memcpy|memset|aten::(copy_|fill_|zero_|cat)"),
)
OTHER = "norm, elementwise"
CATEGORIES = (
    *(name for name, _ in _BY_NAME),
    OTHER,
    *_BY_PHASE.values(),
    COMMUNICATION,
    IDLE,
)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Span(NamedTuple):
    """Something that ran; times in microseconds."""

    start: float
    end: float
    category: str
    phase: str


class Table(NamedTuple):
    """Exclusive microseconds by (category, phase), of all profiled steps together."""

    steps: int
    microseconds: dict[tuple[str, str], float]
    communication: float  # with what other work hides

    def per_step(self, category: str | None = None, phase: str | None = None) -> float:
        """Milliseconds per step of a category and a phase; None is all of them."""
        chosen = (
            value
            for (c, p), value in self.microseconds.items()
            if category in (None, c) and phase in (None, p)
        )
        return sum(chosen) / self.steps / 1e3


def read_trace(path: pathlib.Path) -> list[dict[str, Any]]:
    """Complete events of an exported trace, plain or gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]


def tabulate(events: list[dict[str, Any]]) -> Table:
    """Account for the time of the profiled steps.

    Raises:
        ValueError: there is no annotated step in the trace.
    """
    steps = sorted(_interval(e) for e in events if e["name"] == STEP and _is_host_mark(e))
    if not steps:
        raise ValueError(f"the trace has no annotation {STEP!r}: no step was profiled")
    phases = _Phases(events)
    spans = list(_spans(events, phases))
    found: dict[tuple[str, str], float] = defaultdict(float)
    for start, end in steps:
        for key, duration in _exclusive(spans, phases, start, end):
            found[key] += duration
    communication = sum(
        min(span.end, end) - max(span.start, start)
        for span in spans
        if span.category == COMMUNICATION
        for start, end in steps
        if span.start < end and span.end > start
    )
    return Table(len(steps), dict(found), communication)


class Kernel(NamedTuple):
    """All launches of one kernel (on a CPU, calls of one operator) in the profiled steps."""

    name: str
    calls: int
    milliseconds: float  # per step


def kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    """What ran on the device, the longest first; nested operators of a CPU count doubly.

    On one stream the sum is the time in which the device worked, which is what a host that never
    made it wait would reach.
    """
    steps = sum(e["name"] == STEP and _is_host_mark(e) for e in events)
    kinds = _DEVICE if any(e.get("cat") in _DEVICE for e in events) else ("cpu_op",)
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in kinds:
            found[event["name"]].append(float(event.get("dur", 0)))
    rows = [Kernel(name, len(us), sum(us) / max(1, steps) / 1e3) for name, us in found.items()]
    return sorted(rows, key=lambda row: -row.milliseconds)


def markdown(table: Table) -> str:
    """One row per category, one column per phase; milliseconds per step."""
    phases = [p for p in PHASES if table.per_step(phase=p)]
    header = ["ms per step", *phases, "in all", "share"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    whole = table.per_step()
    for category in (*CATEGORIES, None):
        total = table.per_step(category)
        if total:
            cells = [f"{table.per_step(category, phase):.2f}" for phase in phases]
            name = category or "in all"
            lines.append(_line([name, *cells, f"{total:.2f}", f"{total / whole:.1%}"]))
    hidden = table.communication / table.steps / 1e3 - table.per_step(COMMUNICATION)
    lines.append(f"\nCommunication hidden behind other work: {hidden:.2f} ms per step.")
    return "\n".join(lines) + "\n"


def category_of(name: str, phase: str) -> str:
    """Category of a kernel or operator by its name and the phase it belongs to."""
    name = name.lower()
    if re.search(_COMMUNICATION, name):
        return COMMUNICATION
    if phase in _BY_PHASE:
        return _BY_PHASE[phase]
    return next((category for category, words in _BY_NAME if re.search(words, name)), OTHER)


class _Phases:
    """Which phase the host is in: the innermost annotation, or the input where there is none."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        marks = [
            (*_interval(e), e["name"].removeprefix(PHASE))
            for e in events
            if e["name"].startswith(PHASE) and _is_host_mark(e)
        ]
        self.changes = sorted({time for start, end, _ in marks for time in (start, end)})
        self._names = [self._innermost(marks, time) for time in self.changes]

    @staticmethod
    def _innermost(marks: list[tuple[float, float, str]], time: float) -> str:
        around = [(start, name) for start, end, name in marks if start <= time < end]
        return max(around)[1] if around else INPUT

    def at(self, time: float) -> str:
        """Phase at an instant."""
        index = bisect.bisect_right(self.changes, time) - 1
        return self._names[index] if index >= 0 else INPUT


def _is_host_mark(event: dict[str, Any]) -> bool:
    return event.get("cat") == "user_annotation"


def _interval(event: dict[str, Any]) -> tuple[float, float]:
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0))


def _spans(events: list[dict[str, Any]], phases: _Phases) -> Iterator[Span]:
    """What ran: the kernels if there are any, otherwise the operators on the host."""
    on_device = any(e.get("cat") in _DEVICE for e in events)
    kinds = _DEVICE if on_device else ("cpu_op",)
    launches = {
        e["args"]["correlation"]: float(e["ts"])
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for event in events:
        if event.get("cat") in kinds:
            start, end = _interval(event)
            launched = launches.get(event.get("args", {}).get("correlation"), start)
            phase = phases.at(launched)
            yield Span(start, end, category_of(event["name"], phase), phase)


def _exclusive(
    spans: list[Span], phases: _Phases, start: float, end: float
) -> Iterator[tuple[tuple[str, str], float]]:
    """Cut [start, end] where something begins or ends; (category, phase) and length of each."""
    inside = sorted(s for s in spans if s.start < end and s.end > start)
    times = {start, end} | {t for s in inside for t in (s.start, s.end)} | set(phases.changes)
    cuts = sorted(t for t in times if start <= t <= end)
    running: list[tuple[bool, float, float, str, str]] = []  # a heap; what counts is first
    coming = iter(inside)
    following = next(coming, None)
    for now, then in itertools.pairwise(cuts):
        while following is not None and following.start <= now:
            last = following.category == COMMUNICATION
            entry = (last, -following.start, following.end, following.category, following.phase)
            heapq.heappush(running, entry)
            following = next(coming, None)
        while running and running[0][2] <= now:
            heapq.heappop(running)
        key = running[0][3:] if running else (IDLE, phases.at(now))
        yield key, then - now


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
