"""Deformable convolution v3, the operator of InternImage: public function and argument checks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_kernels import _backend
from m3i_kernels._checks import FLOATS, dtype_of, tensor_like
from m3i_kernels.dcnv3 import choice
from m3i_kernels.dcnv3.geometry import Geometry, make_geometry
from m3i_kernels.dcnv3.reference import dcnv3_reference

__all__ = ["dcnv3"]


def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    mask_is_logits: bool = False,
    center_scale: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
    algorithm: str = "auto",
    half_blend: bool = False,
) -> Tensor:
    """Deformable convolution v3 (InternImage, arXiv 2211.05778, equation 2).

        y_g(p0) = sum_k  m_gk(p0) * x_g( c(p0) + offset_scale * (p_k + dp_gk(p0)) )

    Each of G groups of C / G channels is read bilinearly (zero outside the image) at K points
    around the kernel's centre c(p0). Points are enumerated column-major: index
    `i * kernel_height + j` is the point at x = i, y = j.

    Args:
        x: (N, H, W, C), float32, bfloat16 or float16 (the reference also takes float64).
        offset: (N, Ho, Wo, G * K * 2), pairs (dx, dy) in input pixels before `offset_scale`.
        mask: (N, Ho, Wo, G * K), the weight of each point; logits with `mask_is_logits`.
        kernel_size: odd integer or (height, width).
        stride: integer or (height, width).
        padding: integer or (height, width).
        dilation: integer or (height, width).
        groups: G; divides C.
        offset_scale: factor on the undeformed grid and on the offsets.
        remove_center: drop the middle point, K = kh * kw - 1.
        mask_is_logits: apply the softmax over the K points of each group inside the operator.
        center_scale: (N, H, W, G), gate s in [0, 1] of the centre-feature-scale of InternImage-H:
            the result is `(1 - s) * y + s * x`. Needs Ho, Wo = H, W.
        deterministic: make the gradients bit-identical from run to run. None follows
            `torch.are_deterministic_algorithms_enabled()`.
        backend: `auto`, `triton` or `reference`; `auto` follows `set_backend`.
        algorithm: of the Triton backend, `auto`, `gather` or `matrix`; `auto` follows
            `set_dcnv3_algorithm` and then the rule of `m3i_kernels.dcnv3.choice`.
        half_blend: allow the gather kernel's forward to read each point in the precision of a
            bfloat16 or float16 x: the four bilinear weights are rounded to that type, and so is
            each of the three sums of their products. Weighting by m and the sum over points stay
            float32. Fewer instructions, a larger error (kernels/README.md has both). Gradients
            are as without it, but for the output that the softmax's starts from. Without effect
            on the matrix kernel, the reference, and where `choice.half_obstacle` says why.

    Inputs may be strided and may differ in dtype; everything is accumulated in float32, unless
    `half_blend` says otherwise.

    Returns:
        (N, Ho, Wo, C) in the dtype of `x`. Gradients flow to x, offset, mask and center_scale.

    Raises:
        ValueError: for a wrong shape, dtype, device or parameter, before any work is started.
    """
    geometry = make_geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    algorithm = choice.asked(algorithm)
    chosen = _backend.resolve(backend, x.device)
    _check_tensors(x, offset, mask, center_scale, geometry, chosen)
    if chosen == "reference":
        return dcnv3_reference(x, offset, mask, geometry, mask_is_logits, center_scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if algorithm == "matrix" and not torch.compiler.is_compiling():  # else the operator says so
        choice.resolve(algorithm, x, offset, mask, center_scale, geometry, mask_is_logits)
    from m3i_kernels.dcnv3.op import dcnv3_op  # Triton is only needed from here on

    return dcnv3_op(
        x,
        offset,
        mask,
        center_scale,
        *geometry,
        mask_is_logits,
        deterministic,
        algorithm,
        half_blend,
    )


def _check_tensors(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    center_scale: Tensor | None,
    geometry: Geometry,
    backend: str,
) -> None:
    dtypes = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (N, H, W, C), not empty")
    dtype_of("x", x, dtypes)
    N, H, W, C = x.shape
    G, K = geometry.groups, geometry.points
    if C % G != 0:
        raise ValueError(f"groups is {G}, but must divide the {C} channels of x")
    Ho, Wo = geometry.output_size(H, W)
    if Ho < 1 or Wo < 1:
        raise ValueError(
            f"x is {H} x {W}, smaller than the kernel: kernel_size {geometry.kernel_size}, "
            f"dilation {geometry.dilation}, padding {geometry.padding}"
        )
    expected = (N, Ho, Wo, G * K * 2)
    tensor_like("offset", offset, expected, dtypes, x.device, "(N, Ho, Wo, groups * K * 2)")
    tensor_like("mask", mask, (N, Ho, Wo, G * K), dtypes, x.device, "(N, Ho, Wo, groups * K)")
    if center_scale is None:
        return
    if (Ho, Wo) != (H, W):
        raise ValueError(
            f"center_scale needs an output as large as x, but x is {H} x {W} and the output "
            f"{Ho} x {Wo}: choose stride 1 and padding = dilation * (kernel_size - 1) / 2"
        )
    tensor_like("center_scale", center_scale, (N, H, W, G), dtypes, x.device, "(N, H, W, groups)")
