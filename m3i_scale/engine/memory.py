"""What this rank holds for as long as the run lasts: bytes by kind, counted in the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from m3i_scale.engine.task import has_teacher, uses_frozen
from m3i_scale.engine.zero import Sharded

PARAMETERS = "parameters"
MASTER = "master weights"
MOMENTS = "moments"
GRADIENTS = "gradients"
ENCODER = "teacher"
UNTRAINED = "frozen weights"  # where there is no teacher
FROZEN = "frozen networks"
AVERAGES = "teacher averages"
WEIGHT_AVERAGES = "averages of the weights"  # likewise
BUFFERS = "reduce buckets"
GATHERED = "gathered parameters"


def held_memory(sharded: Sharded) -> dict[str, int]:
    """Bytes of the storages behind the engine's tensors, each counted under one kind.

    Between steps: shards, states, gradient shards, buckets, and the small parameters that ZeRO
    keeps gathered. Kinds that share a storage with an earlier one (master weights in fp32
    precision at stage 3, "gathered" parameters of a single rank) count as 0 there.
    """
    own, model = sharded.shards, sharded.model
    followed = has_teacher(model)
    kinds = {
        PARAMETERS: own.compute_weights(model),
        MASTER: own.masters,
        MOMENTS: _moments(sharded),
        GRADIENTS: own.gradients(),
        ENCODER if followed else UNTRAINED: _frozen(sharded),
        FROZEN: _outside(model),
        AVERAGES if followed else WEIGHT_AVERAGES: (
            sharded.teacher.averages.values() if sharded.teacher else []
        ),
        BUFFERS: own.buckets(),
        GATHERED: own.gathered_weights(model),
    }
    seen: set[int] = set()
    return {kind: _new_bytes(tensors, seen) for kind, tensors in kinds.items()}


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _frozen(sharded: Sharded) -> Iterator[Tensor]:
    """Weights without gradient, of which nearly all are the teacher's."""
    yield from sharded.shards.frozen_weights(sharded.model)
    teacher = sharded.teacher.teacher if sharded.teacher else None
    if teacher is not None:
        yield from (p.data for p in teacher.parameters())


def _outside(model: nn.Module) -> Iterator[Tensor]:
    """Parameters of networks that are no part of the engine's module."""
    if uses_frozen(model):
        yield from (p.data for module in model.frozen.values() for p in module.parameters())


def _moments(sharded: Sharded) -> Iterator[Tensor]:
    for state in sharded.engine.optimizer.optimizer.state.values():
        yield from (state[moment] for moment in sharded.shards.moments)
