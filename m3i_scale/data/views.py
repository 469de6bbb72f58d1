"""Two random-resized crops per image, and the parameters of the photometric work to come.

The crops are cut here, as uint8 channels-last, by one resize each; colour, blur and solarisation
are only drawn here and applied on the device.  Strengths (`config.Augmentation`) after BYOL (Grill
et al. 2020, appendix B), which SiameseIM and M3I (Table 7) name without numbers: the second view is
blurred and solarised differently from the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.config import Augmentation, Photometric

_CROP_TRIES = 10
CROP_DRAWS = 2 * _CROP_TRIES + 3  # area and ratio of each try; top, left; flip
_PHOTOMETRIC_DRAWS = 14
DRAWS_PER_VIEW = CROP_DRAWS + _PHOTOMETRIC_DRAWS
SOLARIZE_OFF = 256.0
# What torch.nn.functional.interpolate calls for antialias=True.  Called directly, because its
# checks take as long as a tenth of the resize and it cannot write to a given tensor.
_RESIZE: dict[str, Callable[..., Tensor]] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}


class Crop(NamedTuple):
    """A crop in whole pixels of the decoded image, and whether it is mirrored afterwards."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_crop(draws: Sequence[float], height: int, width: int, augmentation: Augmentation) -> Crop:
    """Random-resized crop of a (height, width) image from (at least CROP_DRAWS) uniform draws.

    Area uniform in `scale`, log-ratio uniform in `ratio`; after ten tries that do not fit, the
    largest central crop within `ratio` (torchvision's RandomResizedCrop).
    """
    flip = draws[2 * _CROP_TRIES + 2] < augmentation.flip_probability
    low, high = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    area_low, area_span = augmentation.scale[0], augmentation.scale[1] - augmentation.scale[0]
    for attempt in range(0, 2 * _CROP_TRIES, 2):
        area = height * width * (area_low + area_span * draws[attempt])
        ratio = math.exp(low + (high - low) * draws[attempt + 1])
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int((height - h + 1) * draws[2 * _CROP_TRIES])
            left = int((width - w + 1) * draws[2 * _CROP_TRIES + 1])
            return Crop(top, left, h, w, flip)
    return Crop(*central_crop(height, width, augmentation.ratio), flip)


def central_crop(
    height: int, width: int, ratio: tuple[float, float] = (1.0, 1.0)
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest central crop with width / height in `ratio`."""
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def channels_first(views: Tensor) -> tuple[Tensor, ...]:
    """Each of the views (B, S, S, 3) as `resize_into` takes it: (1, 3, S, S), same memory."""
    return views.permute(0, 3, 1, 2).split(1)


def resize_into(out: Tensor, image: Tensor, crop: Crop, interpolation: str = "bicubic") -> None:
    """Write a crop of uint8 (H, W, 3), resized with anti-aliasing, into `out` (1, 3, S, S).

    The memory of `out` is laid out channels-last (`channels_first`), the fast path of the resize.
    """
    rows, columns, channels = image.stride()
    # One operator instead of slicing, permuting and adding a dimension: between the large work on
    # pixels the start of an operator costs more than it looks.
    window = image.as_strided(
        (1, 3, crop.height, crop.width),
        (rows * image.shape[0], channels, rows, columns),
        image.storage_offset() + crop.top * rows + crop.left * columns,
    )
    # The resize needs its input without gaps between the rows; a mirrored copy is one already.
    window = window.flip(3) if crop.flip else window
    _RESIZE[interpolation](window, out.shape[2:], False, None, None, out=out)


def photometric_parameters(
    draws: NDArray[np.float64], strength: Photometric
) -> dict[str, NDArray[np.generic]]:
    """Parameters from draws (B, DRAWS_PER_VIEW): one row per sample, batch.PHOTOMETRIC_FIELDS."""
    u = draws[:, CROP_DRAWS:]  # (B, 14)
    jitter = u[:, 0] < strength.jitter_probability
    blur = u[:, 6] < strength.blur_probability
    low, high = strength.blur_sigma

    def factor(column: int, spread: float) -> NDArray[np.float32]:
        return np.where(jitter, 1.0 + spread * (2.0 * u[:, column] - 1.0), 1.0).astype(np.float32)

    return {
        "brightness": factor(1, strength.brightness),
        "contrast": factor(2, strength.contrast),
        "saturation": factor(3, strength.saturation),
        "hue": np.where(jitter, strength.hue * (2.0 * u[:, 4] - 1.0), 0.0).astype(np.float32),
        "order": np.argsort(u[:, 9:13], axis=1, kind="stable").astype(np.int64),
        "grayscale": u[:, 5] < strength.grayscale_probability,
        "blur_sigma": np.where(blur, low + (high - low) * u[:, 7], 0.0).astype(np.float32),
        "solarize": np.where(
            u[:, 8] < strength.solarize_probability, strength.solarize_threshold, SOLARIZE_OFF
        ).astype(np.float32),
    }


class Randomness:
    """The random numbers of every position of the stream: Philox keyed by (seed, position).

    One generator is used for all positions and keyed anew for each, which takes a tenth of the
    time of making one.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state  # a copy: counter 0, nothing buffered

    def at(self, position: int) -> np.random.Generator:
        """The generator at the first number of `position`; valid until the next call."""
        self._start["state"]["key"][1] = position
        self._bits.state = self._start
        return self._generator


__all__ = [
    "CROP_DRAWS",
    "DRAWS_PER_VIEW",
    "Crop",
    "Randomness",
    "central_crop",
    "channels_first",
    "draw_crop",
    "photometric_parameters",
    "resize_into",
]
