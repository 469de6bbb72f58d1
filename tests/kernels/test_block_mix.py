"""Block mixing: its definition pixel by pixel, the kernel against the reference, bad arguments."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from m3i_kernels import BlockMixed, block_mix

from helpers.kernel_checks import DEVICE, poisoned

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Measured, absolute, values up to 2.7: float32 2.4e-7; bfloat16 and float16 one unit in the last
# place, as the interpreter truncates and a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def inputs_of(B: int, H: int, W: int, patch: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    view_a, view_b = torch.randint(0, 256, (2, B, H, W, 3), generator=rng, dtype=torch.uint8)
    return {
        "view_a": view_a,
        "view_b": view_b,
        "partner": torch.randperm(B, generator=rng),
        "mask": torch.rand((B, H // patch, W // patch), generator=rng) < 0.5,
        "patch_size": patch,
        "mean": MEAN,
        "std": STD,
    }


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def test_is_the_definition() -> None:
    arguments = inputs_of(4, 8, 12, 4)
    mixed = block_mix(**arguments, dtype=torch.float64, backend="reference")
    statistics = [torch.tensor(s).double().view(3, 1, 1) for s in (MEAN, STD)]

    def normal(image: torch.Tensor) -> torch.Tensor:
        return (image.permute(2, 0, 1).double() / 255 - statistics[0]) / statistics[1]

    for n in range(4):
        own, other = (
            normal(arguments["view_a"][n]),
            normal(arguments["view_a"][arguments["partner"][n]]),
        )
        m = arguments["mask"][n].repeat_interleave(4, 0).repeat_interleave(4, 1).double()
        torch.testing.assert_close(mixed.mix[n], m * own + (1 - m) * other)
        torch.testing.assert_close(mixed.clean_a[n], own)
        torch.testing.assert_close(mixed.clean_b[n], normal(arguments["view_b"][n]))


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    ("size", "patch", "dtype"),
    [
        ((4, 32, 48), 16, torch.float32),
        ((2, 32, 16), 16, torch.bfloat16),
        ((3, 28, 14), 14, torch.float16),
        ((2, 10, 15), 5, torch.float32),
        ((2, 3, 4), 1, torch.float32),
        ((2, 40, 80), 40, torch.bfloat16),
    ],
)
def test_kernel(size: Any, patch: int, dtype: torch.dtype, memory_format: str) -> None:
    arguments = inputs_of(*size, patch) | {"dtype": dtype, "memory_format": memory_format}
    expected = block_mix(**arguments, backend="reference")
    with poisoned():
        found = block_mix(**on_device(arguments), backend="triton")
    for name in BlockMixed._fields:
        result, value = getattr(found, name).cpu(), getattr(expected, name)
        assert result.dtype == dtype
        assert result.stride() == value.stride(), name
        torch.testing.assert_close(
            result, value, rtol=0, atol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_kernel_on_views_and_without_second_view() -> None:
    arguments = inputs_of(4, 8, 8, 4)
    expected = block_mix(**arguments, backend="reference")
    strided = dict(arguments)
    strided["view_a"] = torch.cat((arguments["view_a"], arguments["view_b"]), 2)[:, :, :8]
    strided["mask"] = arguments["mask"].repeat_interleave(2, 2)[:, :, ::2]
    strided["view_b"] = None
    found = block_mix(**on_device(strided), backend="triton")
    assert found.clean_b is None
    torch.testing.assert_close(found.mix.cpu(), expected.mix, rtol=0, atol=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.integers(1, 20),
    dtype=st.sampled_from(list(TOLERANCE)),
    memory_format=st.sampled_from(["channels_last", "contiguous"]),
    has_b=st.booleans(),
    data=st.data(),
)
def test_random_shapes(
    batch: int, grid: tuple[int, int], patch: int, has_b: bool, data: st.DataObject, **keywords: Any
) -> None:
    """Any partners, several rows with the same one among them."""
    arguments = inputs_of(batch, grid[0] * patch, grid[1] * patch, patch) | keywords
    partner = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
    arguments["partner"] = torch.tensor(partner)
    if not has_b:
        arguments["view_b"] = None
    expected = block_mix(**arguments, backend="reference")
    wide = dict(arguments, view_a=arguments["view_a"].repeat(1, 1, 2, 1)[:, :, : grid[1] * patch])
    with poisoned():
        found = block_mix(**on_device(wide), backend="triton")
    for name in BlockMixed._fields[: 3 if has_b else 2]:
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(expected, name),
            rtol=0, atol=TOLERANCE[keywords["dtype"]], msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view_a": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "view_a has shape"),
        ({"view_a": torch.zeros(4, 8, 8, 3)}, "view_a has dtype torch.float32"),
        ({"view_b": torch.zeros(4, 8, 9, 3, dtype=torch.uint8)}, "view_b has shape"),
        ({"partner": torch.zeros(3, dtype=torch.int64)}, "partner has shape"),
        ({"partner": torch.zeros(4, dtype=torch.int32)}, "partner has dtype torch.int32"),
        ({"partner": torch.full((4,), 4)}, r"partner\[0\] is 4, but must be an index in \[0, 4\)"),
        ({"patch_size": 3}, "patch_size is 3, but must divide the image, 8 x 8 pixels"),
        ({"mask": torch.zeros(4, 3, 2, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.zeros(4, 2, 2)}, "mask has dtype torch.float32"),
        ({"std": (1.0, 1.0)}, "std is"),
        ({"std": (1.0, 0.0, 1.0)}, "every value must be positive"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"memory_format": "nhwc"}, "memory_format is 'nhwc'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_mix(**(inputs_of(4, 8, 8, 4) | changes))
