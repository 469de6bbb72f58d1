"""Pixels as networks take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalised_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 (..., 3, H, W) to float32: from 0 to 1, less the mean, over the deviation."""
    centre, scale = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    return (images.float() / 255 - centre) / scale
