"""The linear layer of ZeRO-3: keeps the parameter for the backward pass, not a view of it.

A plain linear layer saves a view of its gathered weight, which would hold the memory that ZeRO-3
means to free. DeepSpeed replaces `torch.nn.functional.linear` by a function that saves the
parameter itself; this does so at a third of the host time, without the inspection of signatures and
the autocast contexts that every one of its calls goes through. Its forward is torch's own, which
adds the bias inside the product. DeepSpeed's adds it by a second pass over the result where that
has more than two dimensions: most of 187 ms in a step of InternImage-H that keeps an H100 busy for
1254, and one more rounding in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` for x (..., I), W (O, I), b (O,); gradients as of `functional.linear`."""
    if torch.is_autocast_enabled(x.device.type):
        return zero3_linear_wrap(x, weight, bias)
    if not torch.is_grad_enabled():
        return _affine(x, weight, bias)
    return _Linear.apply(x, weight, bias)


_affine = torch._C._nn.linear  # `functional.linear`, which DeepSpeed replaces by the above


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _affine(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_x = _by_input(gradient, weight) if wanted[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if wanted[1] else None
        batch = list(range(gradient.dim() - 1))  # not of the rows, which are added in other order
        by_bias = gradient.sum(batch) if bias is not None and wanted[2] else None
        return by_x, by_weight, by_bias


def _by_input(gradient: Tensor, weight: Any) -> Tensor:
    """Gradient of the input; gathers a weight whose module's hooks have not."""
    status = getattr(weight, "ds_status", None)
    if status is None or status.name != "NOT_AVAILABLE":
        return gradient.matmul(weight)
    weight.all_gather()
    try:
        return gradient.matmul(weight)
    finally:
        weight.partition()
