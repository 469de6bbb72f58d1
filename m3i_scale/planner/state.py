"""What lives on a GPU as long as the run, and what waits for a backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

from m3i_scale.config import Engine
from m3i_scale.engine import memory
from m3i_scale.planner import flat
from m3i_scale.planner.sizes import Widths, averaged_weights, shard
from m3i_scale.profiling.record import Trace, Weight

HPZ = "node's copies (hpZ)"


class Activations(NamedTuple):
    """Bytes per sample between forward and backward."""

    kept: float
    inside: float  # of the one block that is being recomputed


def refresh_size(weights: list[Weight], ranks: int, *, whole: bool) -> int:
    """Elements of all ranks' shards of a whole teacher, which stage 3 gathers after a step."""
    if not whole or ranks == 1:
        return 0
    return sum(ranks * shard(w.elements, ranks) for w in averaged_weights(weights))


def state_memory(
    weights: list[Weight],
    ranks: int,
    widths: Widths,
    deepspeed: dict[str, Any],
    *,
    whole: bool,
    moments: int = 2,
) -> dict[str, float]:
    """Stage 3: bytes per rank of what lives as long as the run, as `memory.held_memory` has them.

    `whole`: the teacher is; `moments`: averages that the optimiser keeps.
    """
    zero = deepspeed["zero_optimization"]
    owned = sum(shard(w.elements, ranks) for w in weights if w.trained)
    frozen = sum(
        shard(w.elements, ranks) * (ranks if whole and w.of_teacher else 1)
        for w in weights
        if not w.trained
    )
    averaged = sum(shard(w.elements, ranks) for w in averaged_weights(weights))
    threshold, hpz = zero["stage3_param_persistence_threshold"], zero["zero_hpz_partition_size"]
    state: dict[str, float] = {
        memory.PARAMETERS: owned * widths.compute,
        memory.MASTER: owned * widths.master if widths.master != widths.compute else 0,
        memory.MOMENTS: moments * owned * widths.master,
        memory.GRADIENTS: owned * widths.accumulated,
        memory.ENCODER: frozen * widths.compute,
        memory.AVERAGES: 4 * averaged,
        memory.BUFFERS: zero["reduce_bucket_size"] * widths.reduced,
    }
    if hpz > 1:
        gathered = (w for w in weights if not (whole and w.of_teacher))
        large = (w.elements for w in gathered if w.elements > threshold)
        state[HPZ] = sum(shard(elements, hpz) for elements in large) * widths.compute
    return state


def lasting_memory(
    spec: Engine,
    weights: list[Weight],
    ranks: int,
    deepspeed: dict[str, Any],
    frozen: int = 0,
    *,
    averaged: bool = False,
    moments: int = 2,
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per rank of what lives as long as the run, by kind: on the device, in the host.

    `frozen`: elements of frozen networks outside of ZeRO; `averaged`: all weights have a moving
    average; `moments`: averages that the optimiser keeps.
    """
    widths = Widths.of(spec.precision, deepspeed)
    if spec.zero.stage == 3:
        whole = spec.teacher == "whole"
        state = state_memory(weights, ranks, widths, deepspeed, whole=whole, moments=moments)
    else:
        state = flat.state_memory(weights, ranks, widths, moments)
    if not any(w.of_teacher for w in weights):  # nothing follows a student
        state[memory.UNTRAINED] = state.pop(memory.ENCODER)
        del state[memory.AVERAGES]
    if averaged:
        state[memory.WEIGHT_AVERAGES] = 4 * owned_elements(spec, weights, ranks, widths)
    state[memory.FROZEN] = frozen * widths.compute
    movable = (memory.MASTER, memory.MOMENTS, memory.GRADIENTS)
    offloaded = {k: state.pop(k) for k in movable if spec.zero.offload_optimizer}
    return state, offloaded


def owned_elements(spec: Engine, weights: list[Weight], ranks: int, widths: Widths) -> int:
    """Trained elements whose states a rank has, padding included."""
    trained = [w for w in weights if w.trained]
    if spec.zero.stage == 3:
        return sum(shard(w.elements, ranks) for w in trained)
    return shard(flat.padded(trained, widths), ranks)


def activations(traced: Trace, checkpointed: bool | None = None) -> Activations:
    """Bytes per sample that wait for the backward pass; None: as configured."""
    kept, inside = traced.outside, 0.0
    for block in traced.blocks:
        if block.recomputed if checkpointed is None else checkpointed:
            kept += block.input
            inside = max(inside, block.inside)
        else:
            kept += block.inside
    return Activations(kept, inside)
