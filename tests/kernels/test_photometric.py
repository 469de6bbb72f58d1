"""Photometric augmentation: torchvision, the reference, the kernels; bad arguments."""

from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from m3i_kernels import PhotometricParams, photometric

from helpers.kernel_checks import DEVICE, poisoned

SIZE = (37, 45)
TAPS = 7


def images_of(B: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Smooth colourful images with pure black, white, grey and primary pixels in a corner."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand((B, 3, 6, 6), generator=rng) * 400 - 70
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255)
    images = smooth.byte().permute(0, 2, 3, 1).contiguous()
    corner = [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images[:, 0, :6] = torch.tensor(corner, dtype=torch.uint8)
    return images


def identity(B: int) -> PhotometricParams:
    return PhotometricParams(
        torch.ones(B),
        torch.ones(B),
        torch.ones(B),
        torch.zeros(B),
        torch.arange(4).repeat(B, 1),
        torch.zeros(B, dtype=torch.bool),
        torch.zeros(B),
        torch.full((B,), 256.0),
    )


def random_params(B: int, seed: int = 1) -> PhotometricParams:
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(B, generator=rng) * (high - low) + low

    def sometimes(p: float, value: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(torch.rand(B, generator=rng) < p, value, off)

    return PhotometricParams(
        sometimes(0.8, uniform(0.6, 1.4), 1),
        sometimes(0.8, uniform(0.6, 1.4), 1),
        sometimes(0.8, uniform(0.0, 2.0), 1),
        sometimes(0.8, uniform(-0.5, 0.5), 0),
        torch.stack([torch.randperm(4, generator=rng) for _ in range(B)]),
        torch.rand(B, generator=rng) < 0.3,
        sometimes(0.5, uniform(0.1, 2.0), 0),
        sometimes(0.3, uniform(0, 255), 256),
    )


def run(images: torch.Tensor, params: PhotometricParams, backend: str, **keywords: Any) -> Any:
    device = DEVICE if backend == "triton" else torch.device("cpu")
    params = PhotometricParams(*(p.to(device) for p in params))
    keywords = {"blur_kernel_size": TAPS} | keywords
    return photometric(images.to(device), params, backend=backend, **keywords).cpu()


def by_torchvision(image: torch.Tensor, params: PhotometricParams, n: int) -> torch.Tensor:
    x = image.permute(2, 0, 1)
    for operation in params.order[n].tolist():
        adjust, amount = (
            (TF.adjust_brightness, params.brightness),
            (TF.adjust_contrast, params.contrast),
            (TF.adjust_saturation, params.saturation),
            (TF.adjust_hue, params.hue),
        )[operation]
        x = adjust(x, float(amount[n]))
    if params.grayscale[n]:
        x = TF.rgb_to_grayscale(x, 3)
    if params.blur_sigma[n] > 0:
        x = TF.gaussian_blur(x, TAPS, float(params.blur_sigma[n]))
    if params.solarize[n] <= 255:
        x = TF.solarize(x, float(params.solarize[n]))
    return x.permute(1, 2, 0)


def assert_levels(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """At most one grey level apart, and that in at most `share` of the values."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share


SINGLE = {
    "brightness": {"brightness": [0.0, 0.4, 1.0, 1.7]},
    "contrast": {"contrast": [0.0, 0.4, 1.0, 1.7]},
    "saturation": {"saturation": [0.0, 0.4, 1.0, 1.7]},
    "hue": {"hue": [-0.5, -0.1, 0.21, 0.5]},
    "grayscale": {"grayscale": [True, False, True, False]},
    "blur": {"blur_sigma": [0.1, 0.7, 2.0, 0.0]},
    "solarize": {"solarize": [0.0, 100.5, 128.0, 256.0]},
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_operation_is_torchvisions(name: str) -> None:
    images, params = images_of(4), identity(4)
    for field, values in SINGLE[name].items():
        params = params._replace(**{field: torch.tensor(values)})
    found = run(images, params, "reference")
    expected = torch.stack([by_torchvision(images[n], params, n) for n in range(4)])
    assert_levels(found, expected, share=1e-3)


def test_random_chains_are_torchvisions() -> None:
    images, params = images_of(32), random_params(32)
    found = run(images, params, "reference")
    expected = torch.stack([by_torchvision(images[n], params, n) for n in range(32)])
    difference = (found.int() - expected.int()).abs()
    # Measured 1e-5: rounding at the boundary of a level, which a later operation may magnify.
    assert (difference > 0).float().mean() < 1e-4


def test_identity_changes_nothing() -> None:
    images = images_of(3)
    assert torch.equal(run(images, identity(3), "reference"), images)
    assert torch.equal(run(images, identity(3), "triton"), images)


def test_kernels() -> None:
    images, params = images_of(8), random_params(8)
    with poisoned():
        found = run(images, params, "triton")
    assert found.dtype == torch.uint8
    # Measured 0 in the interpreter.
    assert_levels(found, run(images, params, "reference"), share=1e-3)


@settings(max_examples=8, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 26), st.integers(6, 26)),
    half=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_random_shapes(batch: int, size: tuple[int, int], half: int, seed: int) -> None:
    images, params = images_of(2 * batch, size)[::2], random_params(batch, seed)
    taps = 2 * min(half, min(size) - 1) + 1
    with poisoned():
        found = run(images, params, "triton", blur_kernel_size=taps)
    assert_levels(found, run(images, params, "reference", blur_kernel_size=taps), share=2e-3)


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_fused_normalisation(memory_format: str) -> None:
    images, params = images_of(4, (16, 20)), random_params(4)
    keywords = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "memory_format": memory_format}
    expected = run(images, params, "reference", **keywords)
    with poisoned():
        found = run(images, params, "triton", **keywords)
    assert found.stride() == expected.stride()
    level = 1 / (255 * 0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * level)
    assert ((found - expected).abs() > 1e-5).float().mean() < 1e-3
    half = run(images, params, "triton", **keywords, dtype=torch.bfloat16)
    torch.testing.assert_close(half.float(), found, rtol=1e-2, atol=1e-2)


def test_blur_kernel_size_defaults_to_a_tenth() -> None:
    images = images_of(1, (64, 80))
    params = identity(1)._replace(blur_sigma=torch.tensor([1.5]))
    defaulted = photometric(images, params, backend="reference")
    assert torch.equal(defaulted, run(images, params, "reference", blur_kernel_size=7))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("brightness", torch.ones(3), r"params.brightness has shape \(3,\)"),
        ("contrast", torch.ones(2).double(), "params.contrast has dtype torch.float64"),
        ("saturation", torch.tensor([1.0, -1]), r"params.saturation\[1\] is -1.0, .* at least 0"),
        ("brightness", torch.tensor([torch.nan, 1]), r"params.brightness\[0\] is nan, .* finite"),
        ("hue", torch.tensor([0.6, 0]), r"params.hue\[0\] is 0.6.*, but must be in \[-0.5, 0.5\]"),
        (
            "order",
            torch.zeros(2, 4, dtype=torch.int64),
            r"order\[0\] is \[0, 0, 0, 0\], .* 3",
        ),
        ("grayscale", torch.zeros(2), "params.grayscale has dtype"),
        ("blur_sigma", torch.tensor([torch.inf, 1]), r"params.blur_sigma\[0\] is inf, .* finite"),
        ("solarize", torch.tensor([torch.nan, 1]), r"params.solarize\[\d\] is nan, .* not NaN"),
    ],
)
def test_refuses_parameters(field: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        photometric(images_of(2), identity(2)._replace(**{field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, "images has shape"),
        ({"blur_kernel_size": 4}, "blur_kernel_size is 4, but must be odd"),
        ({"blur_kernel_size": 75}, "blur_kernel_size is 75"),
        ({"mean": (0.0, 0.0, 0.0)}, "given together or not"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"memory_format": "x"}, "memory_format is 'x'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": images_of(2), "params": identity(2)} | changes
    with pytest.raises(ValueError, match=message):
        photometric(**arguments)
