"""An evaluation in parts: each rank encodes and judges its own, and all know the results.

In a process that is alone, or in no group, the part is everything and nothing is sent.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.objective.collectives import gather_rows, rank_and_size

T = TypeVar("T")


def own_part(total: int) -> range:
    """This rank's of `total` things: neighbours, in the order of the ranks."""
    rank, ranks = rank_and_size()
    return range(total * rank // ranks, total * (rank + 1) // ranks)


def most_of_a_rank(total: int) -> int:
    """Length of the longest part."""
    return -(-total // rank_and_size()[1])


def of_all_ranks(own: T) -> list[T]:
    """What every rank has (a collective); the ranks' own objects, by pickle."""
    _, ranks = rank_and_size()
    if ranks == 1:
        return [own]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, own)
    return every


def rows_of_all(own: Tensor, counts: list[int], device: torch.device) -> Tensor:
    """Rows (n, D) on the CPU of all ranks, which have `counts`, one after the other (collective).

    `device` is where the group communicates.
    """
    if len(counts) == 1:
        return own
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    table = gather_rows(padded.flatten().to(device)).cpu().view(len(counts), *padded.shape)
    return torch.cat([rows[:count] for rows, count in zip(table, counts, strict=True)])


def sum_of_all(own: Tensor, device: torch.device) -> Tensor:
    """Sum over the ranks of a flat tensor (K,) on the CPU (a collective)."""
    return gather_rows(own.to(device)).sum(0).cpu()
