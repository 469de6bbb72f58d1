"""Checksums of tensors: sums of their bits as integers, modulo 2 ** 64.

A flipped bit changes a sum by a power of two, so that no single one can hide. Two kinds:

- `quick` adds words of eight bytes: one reduction at the speed of memory, for every step.
- `additive` adds elements: the parts of a tensor, however it is cut, add up to the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements that are widened at once on a GPU
MODULUS = 1 << 64


@torch.no_grad()
def quick(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits in words of eight bytes: int64 (), on its device."""
    flat = tensor.detach().reshape(-1)
    per = 8 // flat.element_size()
    first = min(-flat.storage_offset() % per, flat.numel())  # where a word begins
    last = first + (flat.numel() - first) // per * per
    if first == 0 and last == flat.numel():
        return flat.view(torch.int64).sum()
    total = flat.new_zeros((), dtype=torch.int64)
    if last > first:
        total = total + flat[first:last].view(torch.int64).sum()
    for rest in (flat[:first], flat[last:]):
        if rest.numel():
            total = total + rest.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
    return total


@torch.no_grad()
def additive(tensor: Tensor) -> Tensor:
    """Sum of a tensor's elements as integers of their size: int64 (), on its device."""
    flat = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    if flat.device.type == "cpu":  # torch would widen all of it first
        return torch.tensor(int(np.add.reduce(flat.numpy(), dtype=np.int64)))
    parts = [part.sum(dtype=torch.int64) for part in flat.split(_CHUNK)]
    return torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.int64)


def additive_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """`additive` of each, with one wait for each device."""
    found: dict[str, int] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.device == device]
        sums = torch.stack([additive(tensors[name]) for name in names]).tolist()
        found |= dict(zip(names, sums, strict=True))
    return found


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of a batch: of a tensor, a container, or an object's attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _of_each(value.values())
    elif isinstance(value, list | tuple):
        yield from _of_each(value)
    elif dataclasses.is_dataclass(value):
        yield from _of_each(getattr(value, field.name) for field in dataclasses.fields(value))
    elif hasattr(value, "__dict__"):
        yield from _of_each(vars(value).values())


def _of_each(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        yield from tensors_in(value)
