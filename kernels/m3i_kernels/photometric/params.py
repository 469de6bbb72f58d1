"""Parameters of the photometric augmentation, one row per sample."""

from typing import NamedTuple

from torch import Tensor


class PhotometricParams(NamedTuple):
    """Explicit parameters of `photometric`; each tensor has one row per sample.

    brightness, contrast, saturation: float32 (B,), factors of at least 0; 1 is the identity
    hue: float32 (B,), turn of the colour wheel in [-0.5, 0.5]; 0 is the identity
    order: int64 (B, 4), the order of (0 brightness, 1 contrast, 2 saturation, 3 hue)
    grayscale: bool (B,)
    blur_sigma: float32 (B,), pixels; 0 is off
    solarize: float32 (B,), threshold in grey levels; 256 is off
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grayscale: Tensor
    blur_sigma: Tensor
    solarize: Tensor
