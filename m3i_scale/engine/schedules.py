"""Arithmetic of a run: batch per rank, number of steps, learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

from m3i_scale.config import ConfigError, Optimizer
from m3i_scale.objective.momentum import momentum_by_length


class BatchSplit(NamedTuple):
    """How the global batch is spread: `batch = micro * accumulation * ranks`."""

    batch: int
    micro: int
    accumulation: int


def split_batch(batch: int, max_micro: int, ranks: int) -> BatchSplit:
    """The largest even micro-batch up to `max_micro` that divides each rank's share of the batch.

    Even, because neighbours mix in pairs. The global batch never changes with the number of ranks.

    Raises:
        ConfigError: the batch cannot be spread over that many ranks.
    """
    share, rest = divmod(batch, ranks)
    fits = [m for m in range(2, max_micro + 1, 2) if share % m == 0] if rest == 0 else []
    if not fits:
        near = sorted(_usable_rank_counts(batch), key=lambda n: abs(n - ranks))[:6]
        counts = ", ".join(map(str, sorted(near)))
        remedy = f"use {counts} ranks, or another batch" if near else "use an even batch"
        raise ConfigError(
            f"optimizer.global_batch_size {batch} cannot be spread over {ranks} ranks in even "
            f"micro-batches; {remedy}"
        )
    return BatchSplit(batch, fits[-1], share // fits[-1])


def _usable_rank_counts(batch: int) -> list[int]:
    half = batch // 2
    small = {n for n in range(1, math.isqrt(half) + 1) if half % n == 0}
    return sorted(small | {half // n for n in small}) if batch % 2 == 0 else []


class Schedule(NamedTuple):
    """Lengths in optimiser steps and the learning rate as a function of the step."""

    total: int
    warmup: int
    peak: float
    final: float

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step `step` (0-based): linear warm-up, then cosine to `final`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * progress)) / 2


def make_schedule(spec: Optimizer, epoch_samples: int) -> Schedule:
    """Convert the durations of the configuration; an epoch is one pass over all sources.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    total = spec.duration.steps(batch=spec.global_batch_size, epoch_samples=epoch_samples)
    warmup = spec.warmup.steps(batch=spec.global_batch_size, epoch_samples=epoch_samples)
    if warmup >= total:
        raise ConfigError(
            f"optimizer.warmup ({spec.warmup} = {warmup} steps) must be shorter than "
            f"optimizer.duration ({spec.duration} = {total} steps)"
        )
    return Schedule(total, warmup, spec.learning_rate, spec.final_learning_rate)


def momentum_ends(spec: Optimizer, total_steps: int) -> tuple[float, float]:
    """The teacher's momentum at the first step and at the last."""
    start, final = spec.teacher_momentum, spec.teacher_momentum_final
    if start == "by_length":
        return momentum_by_length(total_steps, final), final
    return start, final
