"""The failures of a month, drawn from the causes that were published of 54 days.

Source: "The Llama 3 Herd of Models" (arXiv 2407.21783), section 3.3.4 and table 5: 419 unexpected
interruptions and 47 planned ones in 54 days on 16,384 GPUs. The rate is taken as proportional to
the GPUs; the number of each kind is fixed by its share, so that every month has all kinds, and
order, times and victims follow from a seed.

Time has one scale: **a second of the benchmark is half a minute of the cluster**. By it the
benchmark has the defaults of the product: a checkpoint every 15 min (`checkpoint.every` is 1000
steps, of about a second), a watchdog of 30 min (`engine.stall_minutes`), 160 s in Slurm's queue
after a requeue. A start takes here the seconds that it takes, on CPUs that may be busy: 12 to 30,
which stand for 6 to 15 min. (Over 90 % effective time with an interruption every 3.1 h, as
published, are at most 18 min for each interruption, all together; the page prints the same here.)
Nothing happens for most of the time between two failures. Of it whole checkpoint intervals are
left out, so that a failure strikes the same moment between two checkpoints as it would without.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

DAYS, GPUS, UNEXPECTED, PLANNED = 54, 16_384, 419, 47  # as published
MONTH_DAYS, MONTH_GPUS = 30, 1_024  # of the job that is simulated
MINUTES = 24 * 60 * MONTH_DAYS
SCALE = 0.5  # minutes of the cluster in a second of the benchmark
CHECKPOINT_MINUTES = 15.0
STALL_MINUTES = 30.0  # of the watchdog
QUEUE_MINUTES = 160 / 60  # a requeued job waits 150 to 170 s (slurm/README.md)
KILL_WAIT_MINUTES = 0.5  # Slurm's, from SIGTERM to SIGKILL
SHORTEST_GAP = 15.0  # minutes of training between two failures, of which nothing is left out


class Kind(NamedTuple):
    """A kind of failure."""

    name: str
    what: str  # is done to the benchmark's processes or files
    causes: dict[str, int]  # that it stands for, and how often they were published
    interrupts: bool = True


KINDS = [
    Kind("rank dies", "kill -9 of a rank, in a step", {
        "faulty GPU": 148, "GPU HBM3 memory": 72, "GPU SRAM memory": 19,
        "GPU system processor": 17, "GPU thermal interface and sensor": 6,
    }),
    # The published "software bugs" are not divided: half of them are taken to crash, half to hang.
    Kind("rank crashes", "SIGSEGV in a rank, while a checkpoint is written",
         {"software bug": 27, "dependency": 1}),
    Kind("loader hangs", "SIGSTOP of a rank's data workers", {"software bug": 27, "dependency": 1}),
    Kind("rank stalls", "SIGSTOP of a rank, for ever", {
        "network switch or cable": 35, "NIC": 7, "NCCL watchdog timeouts": 7,
    }),
    Kind("node dies", "kill -9 of all ranks and of what started them", {
        "power supply": 3, "server chassis": 2, "IO expansion board": 2, "CPU": 2,
        "system memory": 2,
    }),
    Kind("preempted at once", "SIGTERM to all ranks, SIGKILL after Slurm's KillWait",
         {"host maintenance": 32}),
    Kind("preempted with grace", "SIGUSR1 to all ranks, as the Slurm templates ask for",
         {"planned": PLANNED}),
    Kind("checkpoint damaged", "kill -9 of all ranks, and a byte of the newest checkpoint flipped",
         {"silent data corruption": 6, "SSD": 3}),
    # These interrupt nobody and were not counted; two a month are an assumption.
    Kind("disk full", "no space left while a checkpoint is written", {}, interrupts=False),
    Kind("rank slow", "a rank stopped for half of the time", {}, interrupts=False),
]  # fmt: skip
SILENT_A_MONTH = 2


class Failure(NamedTuple):
    """One line of the trace."""

    number: int
    kind: str
    minute: float  # of the month
    step: int  # it strikes after this many steps
    rank: int  # the victim, where there is one
    draw: float  # in [0, 1): the moment within the step, the byte


class Month(NamedTuple):
    """What is played."""

    failures: list[Failure]
    steps: int  # of the whole run
    minutes: float  # of the cluster, that it stands for


def a_month() -> dict[str, int]:
    """How often each kind strikes in a month of the simulated job."""
    share = MONTH_DAYS / DAYS * MONTH_GPUS / GPUS
    return {
        kind.name: max(1, round(share * sum(kind.causes.values()))) if kind.interrupts
        else SILENT_A_MONTH
        for kind in KINDS
    }  # fmt: skip


def draw(hours: float, seed: int, step_seconds: float, ranks: int = 2) -> Month:
    """The failures of so many months, one for each hour of the benchmark.

    Args:
        hours: length of the benchmark; of less than one the first failures are played.
        seed: of order, times and victims.
        step_seconds: of a usual step of the benchmark.
        ranks: of the benchmark.
    """
    chance = random.Random(seed)
    kinds, times = list[str](), list[float]()
    for month in range(-int(-hours // 1)):
        own = [name for name, count in a_month().items() for _ in range(count)]
        chance.shuffle(own)
        kinds += own
        times += sorted(MINUTES * (month + chance.random()) for _ in own)
    count = max(1, round(hours * sum(a_month().values())))
    return _played(kinds[:count], times[:count], hours * MINUTES, chance, step_seconds, ranks)


def one_of_each(names: Sequence[str], seed: int, step_seconds: float, ranks: int = 2) -> Month:
    """A rehearsal: these kinds, in this order."""
    chance = random.Random(seed)
    times = [(n + chance.random()) * MINUTES / len(names) for n in range(len(names))]
    return _played(names, times, MINUTES, chance, step_seconds, ranks)


def _played(
    kinds: Sequence[str],
    times: Sequence[float],
    minutes: float,
    chance: random.Random,
    step_seconds: float,
    ranks: int,
) -> Month:
    failures, at, before = list[Failure](), 0.0, 0.0
    for number, (kind, time) in enumerate(zip(kinds, times, strict=True), 1):
        at += played_gap(time - before)
        step = max(1, round(at / SCALE / step_seconds))
        if failures:
            step = max(step, failures[-1].step + 1)
        if kind == "checkpoint damaged":  # there must be one before it
            step = max(step, 2 * checkpoint_steps(step_seconds) + 5)
        rank, moment = chance.randrange(ranks), chance.random()
        failures.append(Failure(number, kind, time, step, rank, moment))
        before = time
    last = failures[-1].step + round(
        (SHORTEST_GAP + played_gap(minutes - before)) / SCALE / step_seconds
    )
    return Month(failures, last, minutes)


def played_gap(minutes: float) -> float:
    """How much of the time between two failures is played: all but whole checkpoint intervals."""
    if minutes <= SHORTEST_GAP:
        return max(0.0, minutes)
    return SHORTEST_GAP + (minutes - SHORTEST_GAP) % CHECKPOINT_MINUTES


def checkpoint_steps(step_seconds: float) -> int:
    """Steps between two checkpoints."""
    return max(2, round(CHECKPOINT_MINUTES / SCALE / step_seconds))
