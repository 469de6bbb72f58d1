"""Depthwise convolution, LayerNorm and GELU in plain torch: what the kernels are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_norm_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Compute `gelu(layer_norm(conv(x)))`; arguments as in `depthwise_norm_gelu`, checked.

    Half-precision inputs are computed in float32, float64 inputs in float64; the result has the
    dtype of `x`. Differentiable in all tensors.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    channels, padding = x.shape[-1], weight.shape[-1] // 2
    image = x.to(compute).permute(0, 3, 1, 2)
    z = F.conv2d(
        image, weight.to(compute), bias.to(compute), padding=padding, groups=channels
    ).permute(0, 2, 3, 1)
    u = F.layer_norm(z, (channels,), norm_weight.to(compute), norm_bias.to(compute), eps)
    return F.gelu(u).to(x.dtype)
