"""The collectives of losses over the global batch; identities without a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank counts as the only one: what runs here communicates with nobody."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank_and_size() -> tuple[int, int]:
    """Rank and size of the default process group, (0, 1) without one or when `alone`."""
    if not _ALONE.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        _, size = rank_and_size()
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = local.shape[0]  # type: ignore[attr-defined]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: their gradients add up.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        rows = ctx.rows  # type: ignore[attr-defined]
        rank, _ = rank_and_size()
        return gradient[rank * rows : (rank + 1) * rows]


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks, in rank order: (B, ...) -> (size * B, ...), with gradient.

    Every rank must call it with the same shape. The gradient is the sum over the ranks' losses, so
    that averaging parameter gradients over ranks gives the gradient of the mean loss.
    """
    _, size = rank_and_size()
    if size == 1:
        return local
    if local.dtype == torch.bool:
        return gather(local.to(torch.uint8)).bool()
    return _GatherWithGradient.apply(local)


def own_columns(index: Tensor, *, gathered: bool) -> Tensor:
    """Column of local row `index` among the candidates of all ranks, or of this rank only."""
    rank, _ = rank_and_size()
    return index + rank * len(index) if gathered else index


@torch.no_grad()
def average(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, without gradient."""
    _, size = rank_and_size()
    value = value.detach().clone()
    if size > 1:
        dist.all_reduce(value)
    return value / size
