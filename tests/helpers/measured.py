"""What a training step sends, and what it leaves in memory, counted where PyTorch dispatches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


class Wire(TorchDispatchMode):
    """Bytes of the full tensors of all collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        if function.namespace == "c10d":
            kind = next((k for word, k in KINDS.items() if word in function.name()), "other")
            # outputs first, inputs second; the larger one is the full tensor
            self.sizes[kind] += max(_bytes(argument) for argument in arguments[:2])
        return function(*arguments, **(named or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


class Allocations(TorchDispatchMode):
    """The storages that operators have made in its context, and which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        known = {t.untyped_storage()._cdata for t in _tensors((arguments, named))}
        result = function(*arguments, **(named or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, seconds: float = 0.5) -> int:
        """Bytes of those that still have an owner.

        gloo's threads let go of the buffers of finished collectives a little later: the smallest
        figure within some seconds is what the training holds.
        """
        found, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            found.append(sum(size for ref, size in self._made.values() if not ref.expired()))
            time.sleep(0.02)
        return min(found)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def require_state(planned: Mapping[str, float], held: Mapping[str, int]) -> None:
    """Assert that a plan's state has the kinds that a rank holds, and their bytes within 2 %."""
    assert {kind for kind, size in planned.items() if size} == {k for k, v in held.items() if v}
    for kind, size in held.items():
        assert planned.get(kind, 0) == pytest.approx(size, rel=0.02), kind
