"""Whether `m3i report` explains what was injected, and what the month cost.

Nothing here reads the run: only the report's tree and the record of what was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from simulated.inject import Injected
from simulated.trace import DAYS, GPUS, KINDS, PLANNED, SCALE, UNEXPECTED

GOAL = 0.97

COSTS = ("start_up", "lost", "stalls", "queueing", "down")
STEADY = ("training", "data", "checkpoint", "other")


class Match(NamedTuple):
    """One injected failure and what the report says of it."""

    injected: Injected
    explained: bool
    cause: str  # of the report, in its words


def match(report: Mapping[str, Any], injected: Sequence[Injected]) -> list[Match]:
    """For each failure the report's explanation."""
    return [_match(report, one) for one in injected]


def unexpected(report: Mapping[str, Any], injected: Sequence[Injected]) -> list[str]:
    """Attempts that ended without anything having been done to them."""
    interrupting = {kind.name for kind in KINDS if kind.interrupts}
    hit = {one.restart for one in injected if one.kind in interrupting}
    return [
        f"restart {one['restart']} ended without a failure: {one['cause']}: {one['words']}"
        for one in report["attempts"]
        if one["restart"] not in hit and one["cause"] != "finished"
    ]


def _match(report: Mapping[str, Any], done: Injected) -> Match:
    found = [n for n, one in enumerate(report["attempts"]) if one["restart"] == done.restart]
    if not found:
        return Match(done, False, "no attempt of that restart")
    number = found[-1]
    if done.kind == "rank slow":
        return _slow(report, done, number)
    if done.kind == "disk full":
        return _unsaved(report, done, number)
    attempt = report["attempts"][number]
    cause = f"{attempt['cause']}: {attempt['words']}"
    explained = _of_attempt(done, attempt["cause"], attempt["words"])
    if done.kind == "checkpoint damaged":
        passed = [
            one for one in report["checkpoint_faults"]
            if one["what"] == "passed over" and one["step"] == done.told["damaged_step"]
            and one["time"] >= done.begin
        ]  # fmt: skip
        explained &= bool(passed)
        cause += "".join(f"; checkpoint of step {one['step']} passed over: {one['words']}"
                         for one in passed[:1])  # fmt: skip
    return Match(done, explained, cause)


def _of_attempt(done: Injected, cause: str, words: str) -> bool:
    victim, task = f"rank {done.rank} (", f"srun: task {done.rank}: "
    return {
        "rank dies": cause == "killed" and f"{task}Killed" in words,
        "rank crashes": cause == "killed" and f"{task}Segmentation" in words,
        "loader hangs": cause == "stalled" and f"rank {done.rank} has made no step" in words
        and "in no collective" in words,
        "rank stalls": cause == "stalled" and victim in words and "said nothing" in words,
        "node dies": cause == "killed" and "no rank said a word" in words,
        "checkpoint damaged": cause == "killed" and "no rank said a word" in words,
        # It may have had the time to save, to say that it was asked, or none at all.
        "preempted at once": cause in ("killed", "stopped")
        and ("SIGTERM" in words or "no rank said a word" in words),
        "preempted with grace": cause == "stopped" and "SIGUSR1" in words,
    }[done.kind]  # fmt: skip


def _slow(report: Mapping[str, Any], done: Injected, number: int) -> Match:
    spells = [
        one for one in report["slow_spells"]
        if one["attempt"] == number + 1 and one["rank"] == done.rank
        and one["begin"] < done.end and one["end"] > done.begin
    ]  # fmt: skip
    words = "; ".join(
        f"rank {one['rank']} held up all others in steps {one['first_step']} to "
        f"{one['last_step']}, by {one['delay']:.1f} s"
        for one in spells
    )
    return Match(done, bool(spells), words or "no such spell")


def _unsaved(report: Mapping[str, Any], done: Injected, number: int) -> Match:
    lost = [
        one for one in report["checkpoint_faults"]
        if one["what"] == "not written" and one["attempt"] == number + 1
        and one["step"] in done.told["unsaved_steps"] and "No space left" in one["words"]
    ]  # fmt: skip
    words = "; ".join(f"checkpoint of step {one['step']}: {one['words']}" for one in lost)
    return Match(done, bool(lost), words or "no such checkpoint")


def effective_ratio(report: Mapping[str, Any], minutes: float) -> dict[str, Any]:
    """The share of the simulated time that was training.

    Costs of interruptions are taken from the report second for second, and scaled. So are the
    delays of slow ranks, which the report leaves among the training. The rest of the time trains as
    well as the steps that count have here, apart from their waits for checkpoints and what else was
    done between them. Waits for data are parts of a step, as in published ratios; `without_data`
    takes them off, too: here the data workers share two cores with the ranks. `most_gpus` is the
    size of a job that would just reach the goal if its interruptions cost what they cost here.

    Args:
        report: `m3i report` of the run.
        minutes: of the cluster, that are simulated.
    """
    shares = report["shares"]
    slow = sum(one["delay"] for one in report["slow_spells"])
    training, whole = shares["training"] - slow, sum(shares[name] for name in STEADY) - slow
    costs = {name: SCALE * shares[name] for name in COSTS} | {"slow ranks": SCALE * slow}
    lost = sum(costs.values())
    left, each = max(0.0, 1 - lost / minutes), lost / max(1, len(report["attempts"]) - 1)
    rate = (UNEXPECTED + PLANNED) / (DAYS * 24 * 60 * GPUS)  # a minute and GPU
    steady = (training + shares["data"]) / whole
    return {
        "ratio": left * steady,
        "without_data": left * training / whole,
        "steady": steady,
        "minutes": minutes,
        "lost_minutes": lost,
        "step_seconds": (shares["training"] + shares["data"]) / (report["steps"]["last"] + 1),
        "most_gpus": int(max(0.0, 1 - GOAL / steady) / (each * rate)) if each else None,
        "costs": costs,  # minutes
        "unscaled": report["effective_ratio"],
    }
