"""Deformable convolution v3 in plain torch: what the kernels are tested against, and the CPU path.

For output position p0 and group g (arXiv 2211.05778, equation 2)

    y_g(p0) = sum_k  m_gk(p0) * x_g( c(p0) + offset_scale * (p_k + dp_gk(p0)) )

where c(p0) is the kernel's centre in the input and x_g is read bilinearly, zero outside the image.

At whole-pixel locations, where every network starts, bilinear reading has a kink and the gradient
of the offset is one-sided: to the right and downwards in the kernels, to either side here, as the
rounding of `grid_sample`'s normalised coordinates has it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_kernels.dcnv3.geometry import Geometry


def dcnv3_reference(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    mask_is_logits: bool = False,
    center_scale: Tensor | None = None,
) -> Tensor:
    """DCNv3 by `grid_sample`, one image per group; arguments as in `dcnv3`, already checked.

    Half-precision inputs are computed in float32, float64 inputs in float64; the result has the
    dtype of `x`. Differentiable in `x`, `offset`, `mask` and `center_scale`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    value = x.to(compute)
    y = _sample_and_sum(value, offset.to(compute), mask.to(compute), geometry, mask_is_logits)
    if center_scale is not None:
        gate = center_scale.to(compute).unsqueeze(-1)  # (N, Ho, Wo, G, 1)
        grouped = (geometry.groups, -1)
        y = torch.lerp(y.unflatten(-1, grouped), value.unflatten(-1, grouped), gate).flatten(-2)
    return y.to(x.dtype)


def _sample_and_sum(
    x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, mask_is_logits: bool
) -> Tensor:
    N, H, W, C = x.shape
    Ho, Wo = offset.shape[1:3]
    G, K = geometry.groups, geometry.points
    images = x.reshape(N, H * W, C).transpose(1, 2).reshape(N * G, C // G, H, W)
    # K outside the positions: softmax and the sum over points then run along contiguous memory
    weights = mask.reshape(N, Ho * Wo, G * K).transpose(1, 2).reshape(N * G, 1, K, Ho * Wo)
    if mask_is_logits:
        weights = weights.softmax(2)
    grid = _sampling_grid(offset, geometry, H, W)  # (N, Ho * Wo, G, K, 2)
    grid = grid.permute(0, 2, 3, 1, 4).reshape(N * G, K, Ho * Wo, 2)
    sampled = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    y = (sampled * weights).sum(2)  # (N * G, C / G, Ho * Wo)
    return y.view(N, C, Ho * Wo).transpose(1, 2).reshape(N, Ho, Wo, C)


def _sampling_grid(offset: Tensor, geometry: Geometry, H: int, W: int) -> Tensor:
    """Sampling locations in the coordinates of `grid_sample`, (N, Ho * Wo, G, K, 2) as (x, y).

    A location p is (2 p + 1) / size - 1 there, so an offset moves it by 2 / size of itself: one
    pass over the offsets.
    """
    N, Ho, Wo = offset.shape[:3]
    like: dict[str, Any] = {"dtype": offset.dtype, "device": offset.device}
    first_y, first_x = geometry.first_center()
    center_x = torch.arange(Wo, **like) * geometry.stride[1] + first_x
    center_y = torch.arange(Ho, **like) * geometry.stride[0] + first_y
    center = torch.stack(torch.meshgrid(center_x, center_y, indexing="xy"), -1)  # (Ho, Wo, 2)
    points = torch.tensor(geometry.grid_points(), **like)  # (K, 2)
    size = torch.tensor((W, H), **like)
    location = center.view(Ho * Wo, 1, 1, 2) + geometry.offset_scale * points
    undeformed = (2 * location + 1) / size - 1  # (Ho * Wo, 1, K, 2)
    deformation = offset.reshape(N, Ho * Wo, geometry.groups, geometry.points, 2)
    return torch.addcmul(undeformed, deformation, 2 * geometry.offset_scale / size)
