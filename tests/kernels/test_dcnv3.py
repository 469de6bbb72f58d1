"""Arguments of dcnv3: every wrong one is named before any work is done."""

from typing import Any

import pytest
import torch
from m3i_kernels import dcnv3

from helpers.kernel_checks import DEVICE


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 4, 5, 8),
        "offset": torch.zeros(2, 4, 5, 2 * 9 * 2),
        "mask": torch.zeros(2, 4, 5, 2 * 9),
        "kernel_size": 3,
        "padding": 1,
        "groups": 2,
    }
    return dcnv3(**(arguments | changes))


def test_accepts_the_unchanged_call() -> None:
    assert call().shape == (2, 4, 5, 8)
    assert call(center_scale=torch.zeros(2, 4, 5, 2)).shape == (2, 4, 5, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 5, 8)}, r"x has shape \(4, 5, 8\)"),
        ({"x": torch.zeros(0, 4, 5, 8)}, "not empty"),
        ({"x": torch.zeros(2, 4, 5, 8, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"groups": 3}, "groups is 3, but must divide the 8 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"kernel_size": 2}, "kernel_size is 2, but must be odd"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\)"),
        ({"kernel_size": 1, "remove_center": True}, "no sampling point"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": -1}, "padding is -1"),
        ({"dilation": (1, 0)}, r"dilation is \(1, 0\)"),
        ({"dilation": 9}, "smaller than the kernel"),
        ({"stride": 2}, r"offset has shape \(2, 4, 5, 36\), but must be \(2, 2, 3, 36\)"),
        ({"offset": torch.zeros(2, 4, 5, 36).long()}, "offset has dtype torch.int64"),
        ({"remove_center": True}, r"must be \(2, 4, 5, 32\)"),
        ({"mask": torch.zeros(2, 4, 5, 9)}, r"mask has shape \(2, 4, 5, 9\)"),
        ({"mask": torch.zeros(2, 4, 5, 18, device="meta")}, "mask is on meta"),
        ({"center_scale": torch.zeros(2, 4, 5, 3)}, "center_scale has shape"),
        (
            {
                "center_scale": torch.zeros(2, 2, 3, 2),
                "stride": 2,
                "offset": torch.zeros(2, 2, 3, 36),
                "mask": torch.zeros(2, 2, 3, 18),
            },
            "center_scale needs an output as large as x",
        ),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_triton_refuses_float64() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        call(x=torch.zeros(2, 4, 5, 8, device=DEVICE).double(), backend="triton")
