"""The report as one tree of numbers and words: what report.json holds and the page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from m3i_scale.report.attempts import Attempt, attempts_of
from m3i_scale.report.read import COLUMN, ReportError, Trace
from m3i_scale.report.shares import SHARES, Account, Interruption, divide
from m3i_scale.report.slowest import slowest, spells


def summarise(trace: Trace, now: float) -> tuple[dict[str, Any], list[Account]]:
    """The report of a run, and the accounts of its attempts.

    Args:
        trace: what the run folder says.
        now: seconds since 1970.

    Raises:
        ReportError: the lines hold no attempt.
    """
    attempts = attempts_of(trace, now)
    if not attempts:
        raise ReportError(f"{trace.folder}: no line of events or metrics can be read")
    accounts, interruptions = divide(attempts)
    begin, end = accounts[0].begin, accounts[-1].end
    shares = {name: sum(a.shares[name] for a in accounts) for name in SHARES}
    ranks, nodes, periods = slowest(attempts)
    device_ranks, device_nodes, device_periods = slowest(attempts, "device")
    return {
        "run": trace.folder.resolve().name,
        "state": attempts[-1].cause,
        "begin": begin,
        "end": end,
        "seconds": end - begin,
        "queued_before": _queued_before(attempts[0]),
        "effective_ratio": _ratio(shares["training"], end - begin),
        **_of_the_allocation(accounts),
        "steps": _steps(accounts),
        "shares": shares,
        "start_up": _start_up(accounts),
        "attempts": [_attempt(account) for account in accounts],
        "interruptions": [_interruption(one) for one in interruptions],
        "slowest_ranks": [slow._asdict() for slow in ranks],
        "slowest_nodes": [slow._asdict() for slow in nodes],
        "slowest_over_time": [p._asdict() | {"worst": p.worst._asdict()} for p in periods],
        "slowest_devices": [slow._asdict() for slow in device_ranks],
        "slowest_device_nodes": [slow._asdict() for slow in device_nodes],
        "slowest_devices_over_time": [
            p._asdict() | {"worst": p.worst._asdict()} for p in device_periods
        ],
        "slow_spells": [spell._asdict() for spell in spells(attempts)],
        "evaluations": _evaluations(trace),
        "faults": [fault for attempt in attempts for fault in attempt.faults],
        "checkpoint_faults": [
            {"attempt": number, **one}
            for number, attempt in enumerate(attempts, 1)
            for one in attempt.checkpoints
        ],
        "damaged_lines": trace.damaged,
    }, accounts


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _queued_before(first: Attempt) -> float | None:
    """Seconds in the queue before the run's first launch, which are not of its time."""
    return None if first.submitted is None else max(0.0, first.start - first.submitted)


def _of_the_allocation(accounts: Sequence[Account]) -> dict[str, float | None]:
    """Hours of ranks that were paid for and how many of them trained; each rank counts."""
    paid = trained = 0.0
    for account in accounts:
        ranks = account.attempt.ranks
        if ranks is None:  # an attempt of another version
            return {"rank_hours": None, "effective_rank_hours": None, "allocation_ratio": None}
        paid += ranks * (account.end - account.begin) / 3600
        trained += ranks * account.shares["training"] / 3600
    return {
        "rank_hours": paid,
        "effective_rank_hours": trained,
        "allocation_ratio": _ratio(trained, paid),
    }


def _steps(accounts: Sequence[Account]) -> dict[str, Any]:
    every = [int(s) for a in accounts for s in a.attempt.rows[-1:, COLUMN["step"]]]
    made = sum(len(account.attempt.rows) for account in accounts)
    again = sum(account.lost_steps for account in accounts)
    return {"last": every[-1] if every else None, "made": made, "made_again": again}


def _evaluations(trace: Trace) -> dict[str, list[list[float]]]:
    """By figure: step and value of every evaluation, in the order of the steps."""
    found: dict[str, list[list[float]]] = {}
    for step, values in sorted(trace.evaluations.items()):
        for name, value in values.items():
            found.setdefault(name, []).append([step, value])
    return found


def _start_up(accounts: Sequence[Account]) -> dict[str, dict[str, float]]:
    """By part: seconds of all attempts, the mean of those that had it, and the longest."""
    found: dict[str, dict[str, float]] = {}
    for part in dict.fromkeys(part for account in accounts for part in account.parts):
        seconds = [account.parts[part] for account in accounts if part in account.parts]
        found[part] = {
            "seconds": sum(seconds),
            "mean": sum(seconds) / len(seconds),
            "longest": max(seconds),
        }
    return found


def _attempt(account: Account) -> dict[str, Any]:
    attempt = account.attempt
    rows = attempt.rows
    steps, times, losses = (rows[:, COLUMN[name]].tolist() for name in ("step", "time", "loss"))
    ends = {
        name: {"step": int(steps[n]), "time": times[n], "loss": _finite(losses[n])}
        for name, n in (("first_step", 0), ("last_step", -1))
        if steps
    }
    return {
        "name": attempt.name,
        "job": attempt.job,
        "restart": attempt.restart,
        "ranks": attempt.ranks,
        "nodes": len(set(attempt.hosts)) or None,
        "submitted": attempt.submitted,
        "start": account.begin,
        "first_step": ends.get("first_step"),
        "last_step": ends.get("last_step"),
        "end": account.end,
        "cause": attempt.cause,
        "words": attempt.words,
        "steps": len(rows),
        "steps_made_again": account.lost_steps,
        "shares": account.shares,
        "start_up": account.parts,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interruption(one: Interruption) -> dict[str, Any]:
    return {
        "attempt": one.attempt + 1,
        "time": one.time,
        "cause": one.cause,
        "words": one.words,
        "steps_made_again": one.lost_steps,
        "seconds": one.seconds,
        "cost": one.cost,
    }
