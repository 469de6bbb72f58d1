"""Counting FLOPs of forward passes on fake or meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from m3i_kernels import active_backend, set_backend
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def _sampling_flops(*_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Of `grid_sample` as DCNv3 uses it: the output has one element per channel and point."""
    return 2 * 5 * out_shape.numel()


def _dcnv3_flops(*inputs: Any, out_shape: torch.Size, **_: Any) -> int:
    """Of the DCNv3 kernel; arguments as `m3i_kernels.dcnv3.op.dcnv3_op`, tensors as shapes."""
    mask, groups = inputs[2], inputs[8]
    return 2 * 5 * out_shape.numel() * (mask[-1] // groups)


def _depthwise_flops(*inputs: Any, out_shape: torch.Size, **_: Any) -> int:
    """Of the depthwise kernel; weight is (C, 1, K, K)."""
    return 2 * out_shape.numel() * inputs[1][-1] ** 2


def _formulas() -> dict[Any, Callable[..., int]]:
    formulas = {torch.ops.aten.grid_sampler_2d: _sampling_flops}
    if hasattr(torch.ops.m3i_kernels, "dcnv3"):  # the module of the kernel has been imported
        formulas[torch.ops.m3i_kernels.dcnv3] = _dcnv3_flops
    if hasattr(torch.ops.m3i_kernels, "depthwise_conv"):
        formulas[torch.ops.m3i_kernels.depthwise_conv] = _depthwise_flops
    return formulas


class _FusedAttention(torch.autograd.Function):
    """Shapes of attention, and what every fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # In memory (B, T, heads, D), so that the heads are joined without a copy.
        *batch, heads, wanted, _ = q.shape
        out = q.new_empty(*batch, wanted, heads, v.shape[-1]).transpose(-3, -2)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("a trace has no backward pass")


class FlopCounter(TorchFunctionMode):
    """Counts the FLOPs of matrix products, attention, convolutions and DCNv3 in its context.

    PyTorch counts by kernel, and which kernel attention gets depends on device, dtype, mask and
    release; not every one of them has a formula. So attention never reaches a kernel here: it is
    counted by its shapes, and its result has a shape and no values. Fake and meta tensors only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels = FlopCounterMode(display=False, custom_mapping=_formulas())
        self._attention = 0

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return self._kernels.get_total_flops() + self._attention

    def __enter__(self) -> FlopCounter:
        self._kernels.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._kernels.__exit__(*reason)

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._attend(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows = query.numel() // query.shape[-1]  # B * heads * T
        self._attention += 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _FusedAttention.apply(query, key, value, attn_mask)


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of `function()` on fake or meta tensors; forward only."""
    with FlopCounter() as counter:
        function()
    return counter.total


@contextlib.contextmanager
def operators(kernels: bool) -> Iterator[None]:
    """The Triton operators, of which fake tensors see only shapes, or the plain torch ones."""
    if kernels:
        import m3i_kernels.dcnv3.op
        import m3i_kernels.depthwise.op  # noqa: F401  before their formulas are looked up
    before = active_backend()
    set_backend("triton" if kernels else "reference")
    try:
        yield
    finally:
        set_backend(before)


def reference_operators() -> contextlib.AbstractContextManager[None]:
    """The plain torch operators, which count and run anywhere."""
    return operators(kernels=False)
