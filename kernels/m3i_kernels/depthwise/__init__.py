"""Depthwise convolution, LayerNorm and GELU, channels last: public function and checks."""

import torch
from torch import Tensor

from m3i_kernels import _backend
from m3i_kernels._checks import FLOATS, dtype_of, tensor_like
from m3i_kernels.depthwise.reference import depthwise_norm_gelu_reference

__all__ = ["depthwise_norm_gelu"]

MAX_KERNEL, MAX_CHANNELS = 7, 16384


def depthwise_norm_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """GELU of the LayerNorm of a depthwise convolution: the branch of InternImage's offsets.

    Stride 1, zero padding of half the kernel, exact GELU (with erf), LayerNorm over the channels.

    Args:
        x: (N, H, W, C), float32, bfloat16 or float16 (the reference also takes float64).
        weight: (C, 1, K, K), K odd and at most 7.
        bias: (C,).
        norm_weight: (C,).
        norm_bias: (C,).
        eps: added to the variance.
        backend: `auto`, `triton` or `reference`; `auto` follows `set_backend`.

    `x` may be strided, and dtypes may differ; sums are accumulated in float32. The kernels round
    the convolution's result to the dtype of `x`, as torch does between its layers.

    Returns:
        (N, H, W, C) in the dtype of `x`. Gradients flow to all five tensors, and are the same bits
        in every run: no atomics.

    Raises:
        ValueError: for a wrong shape, dtype or device, before any work is started.
    """
    chosen = _backend.resolve(backend, x.device)
    _check(x, weight, bias, norm_weight, norm_bias, chosen)
    if chosen == "reference":
        return depthwise_norm_gelu_reference(x, weight, bias, norm_weight, norm_bias, eps)
    from m3i_kernels.depthwise.op import depthwise_conv_op, norm_gelu_op  # needs Triton

    return norm_gelu_op(depthwise_conv_op(x, weight, bias), norm_weight, norm_bias, eps)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, backend: str
) -> None:
    dtypes = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (N, H, W, C), not empty")
    dtype_of("x", x, dtypes)
    C = x.shape[-1]
    if C > MAX_CHANNELS:
        raise ValueError(f"x has {C} channels, but must have at most {MAX_CHANNELS}")
    K = weight.shape[-1] if weight.dim() == 4 else 0
    if K % 2 == 0 or K > MAX_KERNEL:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but must be (C, 1, K, K) with K odd and at "
            f"most {MAX_KERNEL}"
        )
    tensor_like("weight", weight, (C, 1, K, K), dtypes, x.device, "(C, 1, K, K)")
    rows = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, row in rows.items():
        tensor_like(name, row, (C,), dtypes, x.device, "(C,)")
