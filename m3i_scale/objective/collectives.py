"""The collectives of losses over the global batch. Without a process group they are identities."""

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
    """Inside, this rank counts as the only one, and collectives do not communicate."""
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


def _gather_into(output: Tensor, local: Tensor) -> None:
    """`all_gather` of equal parts into one tensor, by the name the installed torch has for it."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(output, local)


def _reduce_scatter_into(output: Tensor, whole: Tensor) -> None:
    """Sum over ranks of equal parts; each rank gets its part."""
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(output, whole)


def gather_rows(local: Tensor) -> Tensor:
    """Equal flat tensors (K,) of all ranks as (size, K), without gradient."""
    _, size = rank_and_size()
    if size == 1:
        return local.view(1, -1)
    table = local.new_empty(size, local.numel())
    _gather_into(table.view(-1), local)
    return table


def gather_rows_into(table: Tensor, local: Tensor) -> None:
    """Equal flat tensors (K,) of all ranks into one (size * K,), without gradient."""
    if rank_and_size()[1] == 1:
        table.copy_(local)
    else:
        _gather_into(table, local)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        _, size = rank_and_size()
        local = local.contiguous()
        whole = local.new_empty(size * local.shape[0], *local.shape[1:])
        _gather_into(whole, local)
        return whole

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: their gradients add up.
        _, size = rank_and_size()
        own = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        _reduce_scatter_into(own, gradient.contiguous())
        return own


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


def own_columns(index: Tensor) -> Tensor:
    """Column of local row `index`, one of equally many rows of each rank, among all ranks' rows."""
    rank, _ = rank_and_size()
    return index + rank * len(index)


@torch.no_grad()
def average(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, without gradient."""
    _, size = rank_and_size()
    value = value.detach().clone()
    if size > 1:
        dist.all_reduce(value)
    return value / size
