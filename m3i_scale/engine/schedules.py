"""Arithmetic of a run: batch per rank, number of steps, learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

from m3i_scale.config import ConfigError, Duration, Optimizer


class BatchSplit(NamedTuple):
    """How the global batch is spread: `batch = micro * accumulation * ranks`."""

    batch: int
    micro: int
    accumulation: int


def split_batch(batch: int, max_micro: int, ranks: int, *, even: bool = True) -> BatchSplit:
    """The largest micro-batch up to `max_micro` that divides each rank's share of the batch.

    With `even` it is an even number, because neighbours mix in pairs. The global batch never
    changes with the number of ranks.

    Raises:
        ConfigError: the batch cannot be spread over that many ranks.
    """
    step = 2 if even else 1
    share, rest = divmod(batch, ranks)
    fits = [m for m in range(step, max_micro + 1, step) if share % m == 0] if rest == 0 else []
    if not fits:
        near = sorted(_usable_rank_counts(batch, step), key=lambda n: abs(n - ranks))[:6]
        counts = ", ".join(map(str, sorted(near)))
        remedy = f"use {counts} ranks, or another batch" if near else "use an even batch"
        kind = "even micro-batches" if even else "equal micro-batches"
        raise ConfigError(
            f"optimizer.global_batch_size {batch} cannot be spread over {ranks} ranks in {kind}; "
            f"{remedy}"
        )
    return BatchSplit(batch, fits[-1], share // fits[-1])


def _usable_rank_counts(batch: int, step: int) -> list[int]:
    parts = batch // step
    small = {n for n in range(1, math.isqrt(parts) + 1) if parts % n == 0}
    return sorted(small | {parts // n for n in small}) if batch % step == 0 else []


class Schedule(NamedTuple):
    """Lengths in optimiser steps and the learning rate as a function of the step."""

    total: int
    warmup: int
    peak: float
    final: float
    form: str = "cosine"  # as `Optimizer.schedule`
    power: float = 0.9
    falls: tuple[int, ...] = ()  # steps at which `step` multiplies by `factor`
    factor: float = 0.1

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step `step` (0-based): linear warm-up, then down to `final`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.form == "step":
            return self.peak * self.factor ** sum(step >= fall for fall in self.falls)
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        if self.form == "cosine":
            share = (1 + math.cos(math.pi * progress)) / 2
        else:
            share = (1 - progress) ** (self.power if self.form == "poly" else 1.0)
        return self.final + (self.peak - self.final) * share


def make_schedule(spec: Optimizer, epoch_samples: int) -> Schedule:
    """Convert the durations of the configuration; an epoch is one pass over all sources.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """

    def steps(length: Duration) -> int:
        return length.steps(batch=spec.global_batch_size, epoch_samples=epoch_samples)

    total, warmup = steps(spec.duration), steps(spec.warmup)
    if warmup >= total:
        raise ConfigError(
            f"optimizer.warmup ({spec.warmup} = {warmup} steps) must be shorter than "
            f"optimizer.duration ({spec.duration} = {total} steps)"
        )
    return Schedule(
        total, warmup, spec.learning_rate, spec.final_learning_rate, spec.schedule, spec.power,
        tuple(map(steps, spec.step_at)), spec.step_factor,
    )  # fmt: skip
