"""Where the time of a run went: every second of every attempt, and between them, has one share.

    training     steps that count: made once, or the last time
    data         in them, waits of the slowest rank for its batches
    checkpoint   in them, waits for checkpoints
    evaluation   in them, evaluation while training
    start_up     of an attempt until its steps take their usual time, by part (`events.PARTS`)
    lost         steps made again after a restart or a rollback, with their waits, and the step that
                 an interruption cut short
    stalls       what a step took beyond any usual one, and the time from the last step to the end
                 of an attempt that did not end well
    queueing     in the scheduler's queue
    down         neither running nor queued: until somebody or something started the run again
    other        logging, pictures, closing

The time of a run begins with its first attempt, not with the queue before it, and ends with the
last moment that is known. *Usual* is the median of the steps beyond the first few of an
attempt (`steps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3i_scale.report.attempts import RUNNING, Attempt
from m3i_scale.report.steps import Steps, Usual, has_stalled, split_steps, usual_steps

SHARES = ("training", "data", "checkpoint", "evaluation", "start_up", "lost", "stalls", "queueing",
          "down", "other")  # fmt: skip
COSTS = ("lost", "stalls", "queueing", "down", "start_up")
FIRST_STEPS = "first steps"


@dataclass
class Account:
    """The time of one attempt, and before it since the one before, in seconds."""

    attempt: Attempt
    begin: float  # of the attempt's own time: its launch
    end: float = 0.0
    shares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 0.0))
    parts: dict[str, float] = field(default_factory=dict)  # of `start_up`
    cut_short: dict[str, float] = field(default_factory=dict)  # by its end: `lost`, `stalls`
    lost_steps: int = 0

    def add(self, share: str, seconds: float) -> None:
        """Add to a share."""
        self.shares[share] += seconds

    def start_up(self, part: str, seconds: float) -> None:
        """Add to the start-up."""
        self.add("start_up", seconds)
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def cut(self, share: str, seconds: float) -> None:
        """Add to a share what the attempt's end has cost."""
        self.add(share, seconds)
        self.cut_short[share] = self.cut_short.get(share, 0.0) + seconds


class Interruption(NamedTuple):
    """What it has cost that an attempt ended, or went back, before the run was over."""

    attempt: int  # number of the attempt that was interrupted, from 0
    time: float
    cause: str
    words: str
    lost_steps: int  # complete steps that were made again
    seconds: dict[str, float]  # by `COSTS`

    @property
    def cost(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


def divide(attempts: Sequence[Attempt]) -> tuple[list[Account], list[Interruption]]:
    """Give every second of the run its share, and say what each interruption has cost."""
    usual = usual_steps(attempts)
    steps = [split_steps(a, u) for a, u in zip(attempts, usual, strict=True)]
    lost = _lost(attempts, steps)
    accounts: list[Account] = []
    for number, attempt in enumerate(attempts):
        account = _before(attempt, accounts[-1].end if accounts else None)
        last = _start_up(account, steps[number])
        _training(account, steps[number], lost[number] >= 0)
        _ending(account, usual[number], last)
        accounts.append(account)
    return accounts, list(_interruptions(accounts, steps, lost))


def _before(attempt: Attempt, ended: float | None) -> Account:
    """The time from the end of the attempt before to the launch of this one."""
    begin = attempt.start if ended is None else max(ended, attempt.start)
    account = Account(attempt, begin)
    if ended is not None:
        queued = begin if attempt.submitted is None else min(max(attempt.submitted, ended), begin)
        account.add("down", queued - ended)
        account.add("queueing", begin - queued)
    return account


def _start_up(account: Account, steps: Steps) -> float:
    """The parts of the start-up, and of rollbacks; the end of the last step or part."""
    attempt, at = account.attempt, account.begin
    ends = [began for _, began in attempt.parts[1:]]
    ends.append(attempt.begins[0][1] if attempt.begins else attempt.end)
    for (part, _), end in zip(attempt.parts, ends, strict=False):
        account.start_up(part, max(0.0, end - at))
        at = max(at, end)
    for gap in steps.restoring:
        account.start_up("checkpoint", gap)
    return max(at, steps.end)


def _training(account: Account, steps: Steps, lost: NDArray[np.bool_]) -> None:
    account.lost_steps = int(lost.sum())
    account.start_up(FIRST_STEPS, float(steps.first.sum()))
    for share in ("training", "data", "checkpoint", "evaluation", "stalls", "other"):
        seconds = getattr(steps, share)
        account.add(share, float(seconds[~lost].sum()))
        account.add("lost", float(seconds[lost].sum()))


def _ending(account: Account, usual: Usual, last: float) -> None:
    """From the last step to the end of the attempt."""
    attempt = account.attempt
    account.end = max(attempt.end, last)
    left = account.end - last
    if not attempt.begins:
        return  # the start-up has it all
    if attempt.cause == RUNNING and not has_stalled(left, usual.step):
        account.end = last  # the step under way has no share yet
    elif attempt.cause in ("finished", "stopped"):
        wait = min(left, max(0.0, attempt.closing_wait))
        account.add("checkpoint", wait)
        account.add("other", left - wait)
    elif not len(attempt.rows) and attempt.cause not in ("stalled", RUNNING):
        account.start_up(FIRST_STEPS, left)
    else:
        begun = 0.0 if attempt.cause == RUNNING else min(left, usual.step)
        account.cut("lost", begun)
        if attempt.cause == "error":
            account.add("other", left - begun)
        else:
            account.cut("stalls", left - begun)


# ---------------------------------------------------------------------------------- interruptions


def _lost(attempts: Sequence[Attempt], steps: Sequence[Steps]) -> list[NDArray[np.int64]]:
    """Of each step of each attempt, the number of the beginning that made it be done again, or -1.

    Beginnings are counted over all attempts, rollbacks among them.
    """
    lost = [np.full(len(s.step), -1) for s in steps]
    furthest = [float(s.step.max(initial=-1)) for s in steps]
    beginning = 0
    for number, attempt in enumerate(attempts):
        for segment, (first, _) in enumerate(attempt.begins):
            for before in range(number + 1):
                if furthest[before] < first:
                    continue
                again = (steps[before].step >= first) & (lost[before] < 0)
                if before == number:
                    again &= steps[before].segment < segment
                lost[before][again] = beginning
                if before < number:
                    furthest[before] = float(steps[before].step[lost[before] < 0].max(initial=-1))
            beginning += 1
    return lost


def _interruptions(
    accounts: Sequence[Account], steps: Sequence[Steps], lost: Sequence[NDArray[np.int64]]
) -> Iterator[Interruption]:
    beginning = 0
    for number, account in enumerate(accounts):
        attempt = account.attempt
        for segment in range(max(1, len(attempt.begins))):
            made = (
                [
                    (
                        int((which == beginning).sum()),
                        float(s.all_but_first[which == beginning].sum()),
                    )
                    for s, which in zip(steps, lost, strict=True)
                ]
                if attempt.begins
                else []
            )
            count, seconds = sum(n for n, _ in made), sum(t for _, t in made)
            beginning += bool(attempt.begins)
            if segment:
                words = f"went back to step {attempt.begins[segment][0]}"
                cost = {"lost": seconds, "start_up": steps[number].restoring[segment - 1]}
                time = attempt.begins[segment][1]
                yield Interruption(number, time, "rollback", words, count, cost)
            elif number:
                before = accounts[number - 1]
                cost = dict.fromkeys(COSTS, 0.0) | before.cut_short
                cost["lost"] += seconds
                for share in ("queueing", "down", "start_up"):
                    cost[share] += account.shares[share]
                cost["start_up"] -= sum(steps[number].restoring)
                yield Interruption(
                    number - 1, before.end, before.attempt.cause, before.attempt.words, count, cost
                )  # fmt: skip
