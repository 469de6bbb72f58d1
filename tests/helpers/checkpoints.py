"""Checkpoints of three tensors, without networks and DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.engine import checkpoint
from m3i_scale.engine.checkpoint import extent

SHAPES = {"a.weight": [5, 3], "a.bias": [1], "b.weight": [7]}


def whole(name: str, step: int) -> Tensor:
    """A tensor of the checkpoint of a step, flattened; different in each."""
    count = int(torch.Size(SHAPES[name]).numel())
    return torch.arange(count, dtype=torch.float32) + 100 * step + len(name)


def write(folder: Path, step: int, ranks: int) -> Path:
    """A complete checkpoint as that many ranks write it."""
    writes = []
    for rank in range(ranks):
        tensors = {"rng/cpu": torch.full((4,), rank, dtype=torch.uint8)}
        for name in SHAPES:
            own = extent(whole(name, step).numel(), rank, ranks)
            tensors[f"weight/{name}"] = whole(name, step)[own.start : own.stop].clone()
        state = {"ranks": ranks, "shapes": SHAPES, "step": step}
        writes.append(checkpoint.begin_write(folder, step, rank, ranks, tensors, state))
    for one in writes:
        one.thread.join()
        assert not one.failure
    return checkpoint.publish(writes[0], ranks)
