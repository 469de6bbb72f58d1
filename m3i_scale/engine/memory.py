"""What this rank holds for as long as the run lasts: bytes by kind, counted in the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from m3i_scale.engine import shards
from m3i_scale.engine.zero import Sharded

PARAMETERS = "parameters"
MASTER = "master weights"
MOMENTS = "Adam moments"
GRADIENTS = "gradients"
ENCODER = "teacher"
AVERAGES = "teacher averages"
BUFFERS = "reduce buckets"
GATHERED = "gathered parameters"


def held_memory(sharded: Sharded) -> dict[str, int]:
    """Bytes of the storages behind the engine's tensors, each counted under one kind.

    Between steps: shards, states, gradient shards, buckets, and the small parameters that ZeRO
    keeps gathered. Kinds that share a storage with an earlier one (master weights in fp32
    precision, "gathered" parameters of a single rank) count as 0 there.
    """
    kinds = {
        PARAMETERS: (p.ds_tensor for p in _parameters(sharded.model) if p.requires_grad),
        MASTER: sharded.engine.optimizer.fp32_partitioned_groups_flat,
        MOMENTS: _moments(sharded),
        GRADIENTS: [sharded.engine.optimizer.grad_partitions_flat_buffer],
        ENCODER: _frozen(sharded),
        AVERAGES: sharded.teacher.averages.values() if sharded.teacher else [],
        BUFFERS: _buckets(sharded),
        GATHERED: (p.data for p in _parameters(sharded.model) if p.ds_status.name == "AVAILABLE"),
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


def _parameters(model: nn.Module) -> Iterator[Any]:
    """Parameters, with the attributes that ZeRO-3 has given them."""
    return iter(model.parameters())


def _frozen(sharded: Sharded) -> Iterator[Tensor]:
    """Weights without gradient, of which nearly all are the teacher's."""
    yield from (p.ds_tensor for p in _parameters(sharded.model) if not p.requires_grad)
    if sharded.teacher is not None:
        yield from (p.data for p in sharded.teacher.teacher.parameters())


def _moments(sharded: Sharded) -> Iterator[Tensor]:
    for state in sharded.engine.optimizer.optimizer.state.values():
        yield from (state[moment] for moment in shards.MOMENTS)


def _buckets(sharded: Sharded) -> Iterator[Tensor]:
    for bucket in sharded.engine.optimizer.ipg_buckets.values():
        if bucket.buffer is not None:
            yield bucket.buffer
