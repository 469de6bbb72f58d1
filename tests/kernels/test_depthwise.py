"""Depthwise convolution with LayerNorm and GELU: the kernels against float64, bad arguments."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m3i_kernels import depthwise_norm_gelu
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers.kernel_checks import DEVICE, TOLERANCE, assert_close, poisoned

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")
# (N, H, W, C), K, dtype. The tiles: strips of 4 columns, 64 channels; rows of 2^n channels + rest.
CASES: dict[str, tuple[tuple[int, int, int, int], int, torch.dtype]] = {
    "odd": ((2, 3, 5, 7), 5, torch.float32),
    "one_pixel": ((1, 1, 1, 1), 5, torch.float32),
    "two_blocks_of_channels": ((1, 2, 6, 80), 3, torch.float32),
    "power_of_two": ((1, 4, 4, 16), 7, torch.float32),
    "pointwise": ((2, 2, 3, 6), 1, torch.float32),
    "many_rows": ((3, 9, 9, 3), 5, torch.float32),
    "bfloat16": ((1, 3, 6, 20), 5, torch.bfloat16),
    "float16": ((1, 3, 6, 20), 5, torch.float16),
}


def inputs_of(shape: tuple[int, int, int, int], K: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """CPU tensors, the incoming gradient among them."""
    rng = torch.Generator().manual_seed(0)
    C = shape[-1]
    shapes = {
        "x": shape,
        "weight": (C, 1, K, K),
        "bias": (C,),
        "norm_weight": (C,),
        "norm_bias": (C,),
        "grad": shape,
    }
    tensors = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    tensors["weight"] /= K
    return {k: v.to(dtype) for k, v in tensors.items()}


def run(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Output and gradients by name; the reference runs in float64 on the CPU."""
    reference = backend == "reference"
    device, dtype = ("cpu", torch.float64) if reference else (DEVICE, None)
    placed = {k: v.detach().to(device, dtype) for k, v in tensors.items()}
    grad = placed.pop("grad")
    leaves = {k: v.requires_grad_() for k, v in placed.items()}
    output = depthwise_norm_gelu(**leaves, eps=1e-3, backend=backend)
    output.backward(grad.to(output))
    return {"output": output.detach()} | {f"grad_{k}": v.grad for k, v in leaves.items()}


def test_reference_is_the_three_layers() -> None:
    tensors = {k: v.double() for k, v in inputs_of((2, 3, 5, 7), 5, torch.float64).items()}
    x, weight, bias, gamma, beta = (tensors[k] for k in NAMES)
    z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=2, groups=7).permute(0, 2, 3, 1)
    n = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    u = gamma * n + beta
    expected = u * torch.special.ndtr(u)
    found = depthwise_norm_gelu(x, weight, bias, gamma, beta, backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    shape, K, dtype = CASES[name]
    tensors = inputs_of(shape, K, dtype)
    with poisoned():
        found = run(tensors, "triton")
    for key, value in found.items():
        assert value.dtype == dtype, key
    assert_close(found, run(tensors, "reference"), 2 * TOLERANCE[dtype])


def test_strided_images_and_mixed_dtypes() -> None:
    tensors = inputs_of((2, 3, 5, 6), 3, torch.float16)
    tensors["norm_weight"] = tensors["norm_weight"].float()
    expected = run(tensors, "reference")
    x = tensors["x"]
    for view in (
        torch.cat((x, x), -1)[..., :6],
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    ):
        found = run(tensors | {"x": view}, "triton")
        assert found["grad_norm_weight"].dtype == torch.float32
        assert_close(found, expected, 2 * TOLERANCE[torch.float16])


def test_repeats_bit_for_bit() -> None:
    tensors = inputs_of((2, 9, 9, 3), 5, torch.float32)
    first, second = (run(tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_beyond_32_bit_offsets() -> None:
    """Two images of two rows, 2**30 elements from row to row and 2**31 from image to image."""
    length = 2**31 + 2**30 + 64
    if DEVICE.type == "cpu":  # numpy does not touch the pages in between
        buffer = torch.from_numpy(np.empty(length, np.float16))
    else:
        buffer = torch.empty(length, dtype=torch.float16, device=DEVICE)
    tensors = inputs_of((2, 2, 3, 8), 3, torch.float16)
    expected = run(tensors, "reference")
    x = buffer.as_strided((2, 2, 3, 8), (2**31, 2**30, 8, 1)).copy_(tensors["x"])
    leaves = [
        x.requires_grad_(),
        *(tensors[k].to(DEVICE).requires_grad_() for k in NAMES[1:]),
    ]
    output = depthwise_norm_gelu(*leaves, eps=1e-3, backend="triton")
    gradients = torch.autograd.grad(output, leaves, tensors["grad"].to(DEVICE))
    found = {f"grad_{k}": g for k, g in zip(NAMES, gradients, strict=True)}
    assert_close({"output": output.detach()} | found, expected, 2 * TOLERANCE[torch.float16])


@pytest.fixture
def leaves() -> list[Tensor]:
    tensors = inputs_of((1, 2, 3, 3), 3, torch.float32)
    return [tensors[k].to(DEVICE).requires_grad_() for k in NAMES]


def _call(*tensors: Tensor) -> Tensor:
    return depthwise_norm_gelu(*tensors, backend="triton")


def test_opcheck(leaves: list[Tensor]) -> None:
    from m3i_kernels.depthwise.op import depthwise_conv_op, norm_gelu_op

    torch.library.opcheck(depthwise_conv_op, tuple(leaves[:3]))
    torch.library.opcheck(norm_gelu_op, (leaves[0], *leaves[3:], 1e-6))


def test_compiles_and_is_recomputed(leaves: list[Tensor]) -> None:
    expected = torch.autograd.grad(_call(*leaves).square().sum(), leaves)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves), expected
    )
    y = checkpoint(_call, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 6)}, r"x has shape \(3, 4, 6\)"),
        ({"x": torch.zeros(0, 3, 4, 6)}, "not empty"),
        ({"x": torch.zeros(1, 1, 1, 20000)}, "x has 20000 channels"),
        ({"weight": torch.zeros(6, 1, 4, 4)}, "with K odd and at most 7"),
        ({"weight": torch.zeros(6, 1, 9, 9)}, "with K odd and at most 7"),
        ({"weight": torch.zeros(6, 9)}, "with K odd"),
        ({"weight": torch.zeros(6, 1, 3, 5)}, "weight has shape"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), but must be \(6,\)"),
        ({"norm_bias": torch.zeros(6).long()}, "norm_bias has dtype torch.int64"),
        ({"norm_weight": torch.zeros(6, device="meta")}, "norm_weight is on meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 3, 4, 6),
        "weight": torch.zeros(6, 1, 5, 5),
        "bias": torch.zeros(6),
        "norm_weight": torch.zeros(6),
        "norm_bias": torch.zeros(6),
    }
    assert depthwise_norm_gelu(**arguments).shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match=message):
        depthwise_norm_gelu(**(arguments | changes))


def test_triton_refuses_float64() -> None:
    tensors = inputs_of((1, 3, 4, 6), 5, torch.float64)
    arguments = {name: tensors[name].to(DEVICE) for name in NAMES}
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        depthwise_norm_gelu(**arguments, backend="triton")
