"""The result of a simulated month as numbers, a page and pictures."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulated.trace import KINDS, MONTH_GPUS, SCALE, Month

Tree = dict[str, Any]


def tree(found: Mapping[str, Any], month: Month, command: str, seconds: float) -> Tree:
    """What month.json holds.

    Args:
        found: `month.judge`.
        month: what was played.
        command: that did.
        seconds: it took.
    """
    report = found["report"]
    return {
        "command": command,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "goals": found["goals"],
        "effective": found["effective"],
        "steps": month.steps,
        "attempts": len(report["attempts"]),
        "failures": [
            {**one.injected.as_json(), "explained": one.explained, "report": one.cause}
            for one in found["matches"]
        ],
        "differences": found["differences"],
        "unexpected": found["unexpected"],
        "shares": report["shares"],
        "hour": {name: report[name] for name in ("seconds", "effective_ratio", "steps")},
    }


def markdown(result: Tree) -> str:
    """The page."""
    return "\n".join(
        [*_head(result), *_time(result), *_kinds(result), *_failures(result), *_problems(result)]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |"
    yield ""


def _head(result: Tree) -> Iterator[str]:
    yield (
        f"`{result['command']}`: {len(result['failures'])} failures, {result['attempts']} attempts,"
        f" {result['steps']} steps; {result['seconds'] / 60:.0f} min on {result['cores']} cores.\n"
    )
    rows = []
    if result["effective"]:
        effective = result["effective"]
        rows.append((
            "effective time at least 97 %", f"{100 * effective['ratio']:.2f} % of "
            f"{effective['minutes'] / 1440:.1f} days on {MONTH_GPUS:,} GPUs",
            _mark(result["goals"]["effective"]),
        ))  # fmt: skip
    differing, strangers = len(result["differences"]), len(result["unexpected"])
    explained = sum(one["explained"] for one in result["failures"])
    rows += [
        ("final state and all steps equal to the undisturbed run, bit for bit",
         f"{differing} differences" if differing else "equal", _mark(result["goals"]["exact"])),
        ("every failure explained by m3i report",
         f"{explained} of {len(result['failures'])}; {strangers} unexpected ends",
         _mark(result["goals"]["explained"])),
    ]  # fmt: skip
    yield from _table(("goal", "result", ""), rows)


def _mark(good: bool) -> str:
    return "reached" if good else "**missed**"


def _time(result: Tree) -> Iterator[str]:
    effective = result["effective"]
    if not effective:
        return
    yield (
        f"A second here is {60 * SCALE:g} s of the cluster; whole checkpoint intervals between "
        f"failures are left out. A usual step took {effective['step_seconds']:.2f} s. Costs in "
        f"{effective['minutes'] / 1440:.1f} days:\n"
    )
    rows = [
        (name.replace("_", " "), f"{minutes:.0f} min",
         f"{100 * minutes / effective['minutes']:.2f} %")
        for name, minutes in effective["costs"].items()
    ]  # fmt: skip
    yield from _table(("cost", "time", "share"), rows)
    interruptions = max(1, result["attempts"] - 1)
    yield (
        f"{effective['lost_minutes'] / interruptions:.0f} min for each interruption: with that, "
        f"97 % is reached up to {effective['most_gpus']:,} GPUs. The rest of "
        f"the time is training but for {100 * (1 - effective['steady']):.2f} %: waits for "
        "checkpoints, logging, closing. With waits for data taken off, too, which here share two "
        f"cores with the ranks: {100 * effective['without_data']:.2f} % effective.\n"
    )
    yield (
        f"The benchmark's own time, with nothing scaled: {100 * effective['unscaled']:.1f} % of "
        f"{result['hour']['seconds'] / 60:.0f} min.\n"
    )


def _kinds(result: Tree) -> Iterator[str]:
    counts = Counter(one["kind"] for one in result["failures"])
    explained = Counter(one["kind"] for one in result["failures"] if one["explained"])
    rows = [
        (kind.name, kind.what, ", ".join(kind.causes) or "assumed: two a month", counts[kind.name],
         explained[kind.name])
        for kind in KINDS if counts[kind.name]
    ]  # fmt: skip
    yield from _table(("failure", "what is done", "stands for", "injected", "explained"), rows)


def _failures(result: Tree) -> Iterator[str]:
    rows = [
        (one["number"], f"{one['minute'] / 1440:.2f}", one["kind"], one["rank"], one["step"],
         one["restart"], ("" if one["explained"] else "**not explained**: ") + one["report"])
        for one in result["failures"]
    ]  # fmt: skip
    yield from _table(("", "day", "failure", "victim", "after step", "restart", "m3i report"), rows)


def _problems(result: Tree) -> Iterator[str]:
    for line in (*result["differences"], *result["unexpected"]):
        yield f"* {line}"


def write(folder: Path, result: Tree, found: Mapping[str, Any]) -> None:
    """month.json, month.md, and `m3i report` of the disturbed run beside them."""
    from m3i_scale.report.page import markdown as report_page
    from m3i_scale.report.picture import save_picture

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "month.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "month.md").write_text(markdown(result))
    report = found["report"]
    (folder / "report.md").write_text(report_page(report, "report.png"))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    evaluations = report["evaluations"]
    save_picture(folder / "report.png", found["accounts"], report["shares"], evaluations)
