"""Photometric augmentation in plain torch, vectorised over the batch.

Grey levels are kept as float32 planes (B, 3, H, W) that hold whole numbers: like torchvision, every
operation ends on 8-bit levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_kernels.photometric.params import PhotometricParams

GREY = (0.2989, 0.587, 0.114)  # luma weights of torchvision and Pillow


def photometric_reference(
    images: Tensor, params: PhotometricParams, blur_kernel_size: int
) -> Tensor:
    """Augment uint8 (B, H, W, 3); arguments as in `photometric`, already checked."""
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = _jitter(x, params)
    rows = params.grayscale.nonzero().flatten()
    x[rows] = _grey(x[rows]).expand(-1, 3, -1, -1)
    rows = (params.blur_sigma > 0).nonzero().flatten()
    if rows.numel() > 0:
        x[rows] = _blur(x[rows], params.blur_sigma[rows], blur_kernel_size)
    x = torch.where(x >= _per_sample(params.solarize), 255 - x, x)
    return x.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


def _jitter(x: Tensor, params: PhotometricParams) -> Tensor:
    """Brightness, contrast, saturation and hue in the order each sample asks for, in place."""
    operations = (
        (params.brightness, 1.0, _brightness),
        (params.contrast, 1.0, _contrast),
        (params.saturation, 1.0, _saturation),
        (params.hue, 0.0, _hue),
    )
    for position in range(4):
        for index, (amount, identity, operation) in enumerate(operations):
            wanted = (params.order[:, position] == index) & (amount != identity)
            rows = wanted.nonzero().flatten()
            if rows.numel() > 0:
                x[rows] = operation(x[rows], _per_sample(amount[rows]))
    return x


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(x: Tensor, other: Tensor | float, ratio: Tensor) -> Tensor:
    return (ratio * x + (1 - ratio) * other).clamp_(0, 255).trunc_()


def _grey(x: Tensor) -> Tensor:
    r, g, b = x.split(1, dim=1)
    return (GREY[0] * r + GREY[1] * g + GREY[2] * b).trunc_()  # (B, 1, H, W)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, 0.0, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    # float64: a sum of whole numbers that no image size makes inexact
    mean = _grey(x).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    return _blend(x, mean, factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue: RGB -> HSV -> RGB without leaving grey levels for value and chroma.

    Channel n of (5, 3, 1) for (R, G, B) is `value - chroma * clamp(min(k, 4 - k), 0, 1)` with
    `k = (n + 6 * hue) mod 6`, which is the usual six-way case distinction in closed form.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)  # (B, H, W)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(
        value == r,
        (g - b) / divisor,
        torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    sextant = (sextant + 6 * shift.view(-1, 1, 1)).unsqueeze(1)  # 6 * hue
    channel = torch.tensor((5.0, 3.0, 1.0), device=x.device).view(1, 3, 1, 1)
    k = torch.remainder(sextant + channel, 6)
    weight = torch.minimum(k, 4 - k).clamp_(0, 1)
    shifted = value.unsqueeze(1) - chroma.unsqueeze(1) * weight
    # torchvision maps [0, 1] to levels by floor(v * 255.999)
    return (shifted * (255.999 / 255)).trunc_()


def _blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with reflected borders, one sigma (pixels) per sample."""
    b, _, H, W = x.shape
    half = kernel_size // 2
    taps = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.unsqueeze(1)).square())  # (b, k)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (b * 3, k)
    planes = F.pad(x.reshape(1, b * 3, H, W), (half, half, half, half), mode="reflect")
    planes = F.conv2d(planes, kernel.view(b * 3, 1, 1, kernel_size), groups=b * 3)
    planes = F.conv2d(planes, kernel.view(b * 3, 1, kernel_size, 1), groups=b * 3)
    return planes.view(b, 3, H, W).round_()
