"""Crops are what torchvision's RandomResizedCrop draws, photometric draws what ColorJitter does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as V

from m3i_scale.config import Augmentation, Photometric
from m3i_scale.data.batch import PHOTOMETRIC_FIELDS
from m3i_scale.data.views import (
    DRAWS_PER_VIEW,
    Crop,
    Randomness,
    channels_first,
    draw_crop,
    photometric_parameters,
    resize_into,
)


def draws(count: int) -> np.ndarray:
    return np.stack([Randomness(1).at(n).random(DRAWS_PER_VIEW) for n in range(count)])


def test_crops_lie_inside_and_follow_their_distribution():
    crops = [draw_crop(row, 200, 300, Augmentation()) for row in draws(4000)]
    tops, lefts, heights, widths, flips = (np.array(column) for column in zip(*crops, strict=True))
    assert (tops >= 0).all()
    assert (tops + heights <= 200).all()
    assert (lefts >= 0).all()
    assert (lefts + widths <= 300).all()
    area = heights * widths / 60_000
    assert 0.19 < area.min() < 0.22
    ratio = widths / heights
    assert 0.73 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.36
    assert abs(np.log(ratio).mean()) < 0.06
    assert 0.46 < flips.mean() < 0.54


def test_extreme_shapes_get_the_central_crop():
    crop = draw_crop(draws(1)[0], 10, 1000, Augmentation(scale=(0.9, 1.0)))
    assert (crop.height, crop.width) == (10, 13)
    assert crop.left == (1000 - 13) // 2
    assert draw_crop(draws(1)[0], 1, 1, Augmentation())[:4] == (0, 0, 1, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_is_torchvisions(interpolation, flip):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)
    crop = Crop(5, 7, 41, 53, flip)
    out = torch.empty(1, 24, 24, 3, dtype=torch.uint8)
    resize_into(*channels_first(out), image, crop, interpolation)
    mode = getattr(V.InterpolationMode, interpolation.upper()) if hasattr(V, "InterpolationMode") \
        else interpolation  # fmt: skip
    expected = V.resized_crop(image.permute(2, 0, 1), *crop[:4], [24, 24], mode, antialias=True)
    expected = (expected.flip(2) if flip else expected).permute(1, 2, 0)
    assert (out[0].int() - expected.int()).abs().max() <= 1


def test_photometric_draws():
    strength = Photometric(solarize_probability=0.2, blur_probability=0.5)
    got = photometric_parameters(draws(4000), strength)
    assert tuple(got) == PHOTOMETRIC_FIELDS
    jittered = got["brightness"] != 1
    assert 0.77 < jittered.mean() < 0.83
    assert (np.abs(got["brightness"] - 1) <= 0.4).all()
    assert (np.abs(got["hue"]) <= 0.1).all()
    assert 0.17 < got["grayscale"].mean() < 0.23
    blurred = got["blur_sigma"] > 0
    assert 0.46 < blurred.mean() < 0.54
    assert got["blur_sigma"][blurred].min() >= 0.1
    assert got["blur_sigma"].max() <= 2.0
    assert 0.17 < (got["solarize"] == 128).mean() < 0.23
    assert set(got["solarize"].tolist()) == {128.0, 256.0}
    assert (np.sort(got["order"], axis=1) == np.arange(4)).all()
    assert len({tuple(row) for row in got["order"].tolist()}) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"view_b": {"blur_sigma": (2.0, 0.1)}}, "blur_sigma"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"views": 3}, "views"),
    ],
)
def test_bad_augmentation(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
    with pytest.raises(ValueError, match="hue"):
        Photometric(hue=0.7)
