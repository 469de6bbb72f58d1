"""The report as a page of Markdown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

SHARE_NAMES = {
    "training": "effective training",
    "data": "waits for data",
    "checkpoint": "waits for checkpoints",
    "evaluation": "evaluation",
    "start_up": "start-up",
    "lost": "steps made again",
    "stalls": "stalls",
    "queueing": "queueing",
    "down": "down",
    "other": "other",
}
MOST_ROWS = 200  # of the tables of attempts and interruptions; report.json has all


def markdown(report: dict[str, Any], picture: str) -> str:
    """The page of a report (`summary.summarise`); `picture` is the name of its image."""
    sections = (
        _head(report, picture),
        _shares(report),
        _evaluations(report),
        _start_up(report),
        _attempts(report),
        _interruptions(report),
        _slowest(report),
        _slowest_devices(report),
        _spells(report),
        _faults(report),
        _checkpoints(report),
        _damage(report),
    )
    return "\n".join(line for section in sections for line in section)


def duration(seconds: float) -> str:
    """Seconds as people say them: `4.2 s`, `12 min 30 s`, `5 h 7 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for limit, big, small, unit in (
        (3600, 60, 1, ("min", "s")),
        (86400, 3600, 60, ("h", "min")),
        (float("inf"), 86400, 3600, ("d", "h")),
    ):
        if seconds < limit:
            whole, rest = divmod(round(seconds / small), big // small)
            return f"{whole} {unit[0]} {rest} {unit[1]}"
    raise AssertionError


def moment(seconds: float | None) -> str:
    """A time of day, of this machine's zone."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows[:MOST_ROWS]:
        yield f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |"
    yield ""
    if len(rows) > MOST_ROWS:
        yield f"{len(rows) - MOST_ROWS} more are in the JSON file.\n"


def _head(report: dict[str, Any], picture: str) -> Iterator[str]:
    steps, many = report["steps"], len(report["attempts"])
    yield f"# Run {report['run']}: {report['state']}\n"
    yield f"**Effective-time ratio {_percent(report['effective_ratio'])}** of " + (
        f"{duration(report['seconds'])}, from {moment(report['begin'])} to {moment(report['end'])}."
    )
    if report["rank_hours"] is not None:
        yield (
            f"Of {report['rank_hours']:,.1f} rank hours while the run was not queued or down, "
            f"{_percent(report['allocation_ratio'])} trained."
        )
    last = "none" if steps["last"] is None else steps["last"]
    yield (
        f"{many} attempt{'s' if many > 1 else ''}; last step {last}; {steps['made']:,} steps made, "
        f"{steps['made_again']:,} of them again later.\n"
    )
    yield f"![loss, time, slowest ranks]({picture})\n"


def _shares(report: dict[str, Any]) -> Iterator[str]:
    whole = report["seconds"]
    rows = [
        (SHARE_NAMES[name], duration(seconds), _percent(seconds / whole if whole else None))
        for name, seconds in report["shares"].items()
    ]
    yield "## Where the time went\n"
    yield from _table(("share", "time", "of all"), rows)
    if report["queued_before"]:
        before = duration(report["queued_before"])
        yield f"Before the first launch the job was queued for {before}.\n"


def _evaluations(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        (
            name,
            len(points),
            *(f"{value:.4g} ({int(step)})" for step, value in (points[0], points[-1])),
            *(f"{end(value for _, value in points):.4g}" for end in (min, max)),
        )
        for name, points in report["evaluations"].items()
    ]
    if rows:
        yield "## Evaluation while training\n"
        head = ("figure", "evaluations", "first (step)", "last (step)", "smallest", "largest")
        yield from _table(head, rows)


def _start_up(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        (part, *(duration(values[key]) for key in ("mean", "longest", "seconds")))
        for part, values in report["start_up"].items()
    ]
    if rows:
        yield "## Start-up\n"
        yield from _table(("part", "mean of an attempt", "longest", "all"), rows)


def _attempts(report: dict[str, Any]) -> Iterator[str]:
    rows = []
    for number, one in enumerate(report["attempts"], 1):
        first, last = one["first_step"], one["last_step"]
        rows.append((
            number,
            one["job"] or "",
            one["ranks"] or "",
            moment(one["start"]),
            f"{first['step']} ({moment(first['time'])})" if first else "none",
            f"{last['step']} ({moment(last['time'])})" if last else "none",
            moment(one["end"]),
            f"{one['cause']}: {one['words']}" if one["words"] else one["cause"],
            duration(one["shares"]["training"]),
        ))  # fmt: skip
    yield "## Attempts\n"
    head = ("", "job", "ranks", "start", "first step", "last step", "end", "cause", "training")
    yield from _table(head, rows)


def _interruptions(report: dict[str, Any]) -> Iterator[str]:
    kinds = ("lost", "stalls", "queueing", "down", "start_up")
    rows = [
        (
            one["attempt"],
            moment(one["time"]),
            one["cause"],
            one["steps_made_again"],
            *(duration(one["seconds"].get(kind, 0.0)) for kind in kinds),
            duration(one["cost"]),
        )
        for one in report["interruptions"]
    ]
    if rows:
        yield "## What each interruption cost\n"
        head = ("after attempt", "time", "cause", "steps again", *(SHARE_NAMES[k] for k in kinds))
        yield from _table((*head, "all"), rows)


def _slowest(report: dict[str, Any]) -> Iterator[str]:
    if not report["slowest_ranks"]:
        return
    yield "## Whom the others waited for\n"
    yield (
        "Before the networks start, in data and decoding: a rank's delay is what it took more than "
        "the median rank, in the steps in which it was the slowest.\n"
    )
    worst = [*report["slowest_nodes"], *report["slowest_ranks"]]
    yield from _delays(worst, report["slowest_over_time"])


def _slowest_devices(report: dict[str, Any]) -> Iterator[str]:
    if not report["slowest_devices"]:
        return
    yield "## Slowest inside the step\n"
    yield (
        "Between collectives, where a rank works and waits for no other: its delay is what it "
        "worked longer than the median rank, in the steps in which it worked longest.\n"
    )
    worst = [*report["slowest_device_nodes"], *report["slowest_devices"]]
    yield from _delays(worst, report["slowest_devices_over_time"])


def _delays(worst: Sequence[Any], periods: Sequence[Any]) -> Iterator[str]:
    rows = [(one["name"], one["steps"], duration(one["delay"])) for one in worst]
    yield from _table(("node or rank", "slowest in steps", "delay"), rows)
    over_time = [
        (moment(p["begin"]), f"{p['worst']['name']} {p['host']}".strip(),
         p["worst"]["steps"], duration(p["worst"]["delay"]))
        for p in periods
    ]  # fmt: skip
    yield from _table(("from", "slowest", "in steps", "delay"), over_time)


def _faults(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        (moment(one["time"]), "" if one["step"] is None else one["step"],
         ", ".join(one["nodes"]), one["words"])
        for one in report["faults"]
    ]  # fmt: skip
    if rows:
        yield "## Errors of the hardware\n"
        yield from _table(("time", "step", "nodes", "what was found"), rows)


def _spells(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        (one["attempt"], moment(one["begin"]), moment(one["end"]),
         f"{one['first_step']} to {one['last_step']}", f"rank {one['rank']} {one['host']}".strip(),
         duration(one["delay"]))
        for one in report["slow_spells"]
    ]  # fmt: skip
    if rows:
        yield "## One rank held up all others\n"
        yield from _table(("in attempt", "from", "to", "steps", "who", "delay"), rows)


def _checkpoints(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        (one["attempt"], moment(one["time"]), "" if one["step"] is None else one["step"],
         one["what"], one["words"])
        for one in report["checkpoint_faults"]
    ]  # fmt: skip
    if rows:
        yield "## Checkpoints that do not count\n"
        yield from _table(("in attempt", "time", "after steps", "", "why"), rows)


def _damage(report: dict[str, Any]) -> Iterator[str]:
    for name, lines in report["damaged_lines"].items():
        shown = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        yield (
            f"{name} has {len(lines)} damaged line{'s' if len(lines) > 1 else ''} "
            f"({shown}), left out here.\n"
        )
