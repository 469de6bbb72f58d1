"""What ZeRO stages 1 and 2 hold and send, where every rank has all weights.

The optimiser's states of the parameters, which stand one after the other in flat tensors, are split
evenly. Gradients are summed over all ranks, bucket by bucket (DeepSpeed keeps of the sum what a
rank owns): at stage 1 once a step, from sums of micro-steps that every rank has in full; at stage 2
in every micro-step. Updated weights are gathered once a step, those of the teacher too.
"""

from __future__ import annotations

import math
from typing import Any

from m3i_scale.engine import memory
from m3i_scale.engine.schedules import BatchSplit
from m3i_scale.engine.shards import ALIGNMENT
from m3i_scale.planner.sizes import Flow, Traffic, Widths, averaged_weights, shard
from m3i_scale.profiling.record import Weight

GRADIENTS = "gradients of a step"


def padded(weights: list[Weight], widths: Widths) -> int:
    """Elements of weights in a flat tensor, where each begins at an aligned address."""
    step = ALIGNMENT // widths.compute
    return sum(-(-w.elements // step) * step for w in weights)


def _trained(weights: list[Weight]) -> list[Weight]:
    return [w for w in weights if w.trained]


def state_memory(
    weights: list[Weight], ranks: int, widths: Widths, moments: int = 2
) -> dict[str, float]:
    """Bytes per rank of what lives as long as the run, by the kinds of `memory.held_memory`."""
    trained, averaged = padded(_trained(weights), widths), averaged_weights(weights)
    fixed = sum(w.elements for w in weights if not w.trained)
    moving = padded(averaged, widths) - sum(w.elements for w in averaged)
    owned = shard(trained, ranks)
    return {
        memory.PARAMETERS: trained * widths.compute,
        memory.MASTER: owned * widths.master,
        memory.MOMENTS: moments * owned * widths.master,
        memory.ENCODER: (fixed + moving) * widths.compute,
        memory.AVERAGES: 4 * shard(padded(averaged, widths), ranks),
    }


def gradient_memory(
    weights: list[Weight],
    stage: int,
    ranks: int,
    batch: BatchSplit,
    widths: Widths,
    deepspeed: dict[str, Any],
) -> dict[str, float]:
    """Bytes per rank of gradients during a step."""
    trained = _trained(weights)
    elements = sum(w.elements for w in trained)
    bucket = int(deepspeed["zero_optimization"]["reduce_bucket_size"])
    staged = widths.accumulated if stage == 1 else widths.compute
    # Two that take turns, and a copy of the one under way where it is sent in another precision.
    buckets = 2 * bucket * staged
    if staged != widths.reduced:
        buckets += min(bucket, elements) * widths.reduced
    kept = shard(padded(trained, widths), ranks) * widths.accumulated
    if stage == 1 and batch.accumulation > 1:
        kept += elements * widths.accumulated
    return {GRADIENTS: kept, memory.BUFFERS: buckets}


def update_memory(weights: list[Weight], ranks: int, widths: Widths) -> float:
    """Bytes per rank of the gradients that the optimiser reads, and of its temporaries."""
    owned = shard(padded(_trained(weights), widths), ranks)
    return owned * (widths.accumulated + widths.master)


def step_flow(
    weights: list[Weight],
    stage: int,
    ranks: int,
    batch: BatchSplit,
    widths: Widths,
    deepspeed: dict[str, Any],
) -> Flow:
    """Collectives of one optimiser step, those of the losses left out."""
    trained, averaged = _trained(weights), averaged_weights(weights)
    elements = sum(w.elements for w in trained)
    times = batch.accumulation if stage == 2 else 1
    share = (ranks - 1) / ranks

    def gathered(name: str, which: list[Weight]) -> Traffic:
        size = padded(which, widths) * widths.compute
        return Traffic(f"all-gather, {name} after the update", size, size * share, local=False)

    size = times * elements * widths.reduced
    found = [
        Traffic("all-reduce, gradients", size, 2 * size * share, local=False),
        gathered("weights", trained),
        gathered("teacher", averaged),
    ]
    bucket = int(deepspeed["zero_optimization"]["reduce_bucket_size"])
    # Groups of parameters: with and without weight decay, the student's and the others'.
    gathers = 4 + 2 if averaged else 2
    return Flow([t for t in found if t.size], times * math.ceil(elements / bucket) + gathers)
