"""Per-sample photometric augmentation of uint8 batches: public function and argument checks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_kernels import _backend, _checks
from m3i_kernels.block_mix.reference import normalise_reference
from m3i_kernels.photometric.params import PhotometricParams
from m3i_kernels.photometric.reference import photometric_reference

__all__ = ["PhotometricParams", "photometric"]

_FLOAT_ROWS = ("brightness", "contrast", "saturation", "hue", "blur_sigma", "solarize")


def photometric(
    images: Tensor,
    params: PhotometricParams,
    *,
    blur_kernel_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: str = "channels_last",
    backend: str = "auto",
) -> Tensor:
    """Colour jitter, grayscale, Gaussian blur and solarise, with explicit per-sample parameters.

    Applied in this order: jitter (brightness, contrast, saturation, hue in each sample's own
    order), grayscale, blur, solarise. Every operation agrees with torchvision's functional one
    within one grey level. No gradient flows.

    Args:
        images: uint8 (B, H, W, 3).
        params: one row per sample, see `PhotometricParams`.
        blur_kernel_size: odd side of the Gaussian kernel in pixels; None is a tenth of the shorter
            side of the image, as in SimCLR (23 at 224).
        mean: given together with `std`, fuses the normalisation `(x / 255 - mean) / std`.
        std: per-channel standard deviation of images in [0, 1].
        dtype: of the normalised result: float32, bfloat16 or float16.
        memory_format: `channels_last` or `contiguous`, of the normalised result.
        backend: `auto`, `triton` or `reference`; `auto` follows `set_backend`.

    Returns:
        uint8 (B, H, W, 3); with `mean` and `std` the normalised images, (B, 3, H, W) in `dtype`.

    Raises:
        ValueError: for a wrong shape, dtype, device or parameter. Values of `params` outside their
            range raise on the CPU and are a device-side assertion on a GPU.
    """
    chosen = _backend.resolve(backend, images.device)
    _, H, W = _checks.images_uint8("images", images)
    if blur_kernel_size is None:
        blur_kernel_size = default_blur_kernel_size(H, W)
    _check_blur(blur_kernel_size, H, W)
    _check_params(params, images)
    layout = _checks.memory_format(memory_format)
    if (mean is None) != (std is None):
        raise ValueError(f"mean is {mean!r} and std is {std!r}, but they are given together or not")
    if mean is not None and std is not None:
        _checks.normalisation(mean, std)
    if dtype not in _checks.FLOATS:
        raise ValueError(f"dtype is {dtype}, but must be float32, bfloat16 or float16")
    if chosen == "triton":
        from m3i_kernels.photometric.op import photometric_triton  # Triton only needed from here

        with torch.cuda.device_of(images):
            return photometric_triton(images, params, blur_kernel_size, mean, std, dtype, layout)
    levels = photometric_reference(images, params, blur_kernel_size)
    if mean is None or std is None:
        return levels
    return normalise_reference(levels, mean, std, dtype, layout)


def default_blur_kernel_size(height: int, width: int) -> int:
    """Return an odd kernel side of about a tenth of the shorter side."""
    return min(height, width) // 10 // 2 * 2 + 1


def _check_blur(kernel_size: int, H: int, W: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0 or kernel_size // 2 >= min(H, W):
        raise ValueError(
            f"blur_kernel_size is {kernel_size}, but must be odd and its half smaller than the "
            f"image, {H} x {W} pixels"
        )


def _check_params(params: PhotometricParams, images: Tensor) -> None:
    B, device = images.shape[0], images.device
    for name in _FLOAT_ROWS:
        row = getattr(params, name)
        _checks.tensor_like(f"params.{name}", row, (B,), (torch.float32,), device, "(B,)")
    _checks.tensor_like("params.order", params.order, (B, 4), (torch.int64,), device, "(B, 4)")
    _checks.tensor_like("params.grayscale", params.grayscale, (B,), (torch.bool,), device, "(B,)")
    for name in ("brightness", "contrast", "saturation", "blur_sigma"):
        row = getattr(params, name)
        _checks.values(f"params.{name}", row, (row >= 0) & row.isfinite(), "finite and at least 0")
    _checks.values("params.hue", params.hue, params.hue.abs() <= 0.5, "in [-0.5, 0.5]")
    _checks.values(
        "params.solarize", params.solarize, ~params.solarize.isnan(), "a threshold, not NaN"
    )
    permutation = torch.arange(4, device=device)
    sorted_order = params.order.sort(1).values
    valid = sorted_order == permutation
    _checks.values("params.order", params.order, valid, "a permutation of 0, 1, 2, 3")
