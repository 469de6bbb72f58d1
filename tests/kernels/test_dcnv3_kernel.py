"""The DCNv3 kernels against the float64 reference, and as operators of torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from m3i_kernels import dcnv3
from m3i_kernels.dcnv3.geometry import make_geometry
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import dcnv3_golden
from helpers.kernel_checks import DEVICE, TOLERANCE, assert_close, poisoned

PARAMETERS = ("kernel_size", "stride", "padding", "dilation", "groups", "offset_scale")
DEFAULTS: dict[str, Any] = {
    "size": (1, 5, 7),
    "channels": 8,  # per group
    "kernel_size": 3,
    "stride": 1,
    "padding": 1,
    "dilation": 1,
    "groups": 2,
    "offset_scale": 1.0,
    "remove_center": False,
    "mask_is_logits": True,
    "gated": False,
    "far": 1.0,  # standard deviation of the offsets, in pixels
    "dtype": torch.float32,
}
CASES: dict[str, dict[str, Any]] = {
    "mask_given": {"mask_is_logits": False},
    "gated": {"gated": True, "channels": 32, "groups": 3},
    "gated_mask_given": {"gated": True, "mask_is_logits": False, "channels": 12},
    "kernel_5": {"kernel_size": 5, "padding": 2, "size": (1, 4, 5), "groups": 1},
    "kernel_1": {"kernel_size": 1, "padding": 0},
    "rectangular": {
        "kernel_size": (3, 5),
        "stride": (2, 1),
        "padding": (0, 3),
        "dilation": (1, 2),
    },
    "stride_2": {"stride": 2, "size": (2, 6, 5)},
    "dilated_scaled": {"dilation": 2, "padding": 2, "offset_scale": 1.7, "channels": 16},
    "remove_center": {"remove_center": True, "channels": 24, "size": (1, 4, 5)},
    "far": {"far": 30.0},
    "one_pixel": {"size": (3, 1, 1)},
    "wide_group": {"channels": 64, "groups": 1, "size": (1, 4, 4)},
    "odd_group": {"channels": 5, "groups": 3},
    "bfloat16": {"dtype": torch.bfloat16, "gated": True, "channels": 32},
    "float16": {"dtype": torch.float16, "channels": 16},
    "bfloat16_padded_words": {"dtype": torch.bfloat16, "channels": 24, "size": (1, 2, 3)},
    "bfloat16_odd": {"dtype": torch.bfloat16, "channels": 5, "size": (1, 2, 3)},
}


def inputs_of(case: dict[str, Any], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (CPU tensors with the incoming gradient, keywords of dcnv3)."""
    case = DEFAULTS | case
    keywords = {k: case[k] for k in (*PARAMETERS, "remove_center", "mask_is_logits")}
    geometry = make_geometry(*(keywords[k] for k in PARAMETERS), case["remove_center"])
    (N, H, W), G, K = case["size"], case["groups"], geometry.points
    Ho, Wo = geometry.output_size(H, W)
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    mask = normal(N, Ho, Wo, G, K)
    mask = (mask if case["mask_is_logits"] else mask.softmax(-1)).flatten(-2)
    tensors = {
        "x": normal(N, H, W, G * case["channels"]),
        "offset": case["far"] * normal(N, Ho, Wo, G * K * 2),
        "mask": mask,
        "grad": normal(N, Ho, Wo, G * case["channels"]),
    }
    if case["gated"]:
        tensors["center_scale"] = normal(N, H, W, G).sigmoid()
    tensors = {k: v.to(case["dtype"]) for k, v in tensors.items()}
    # On whole pixels the gradient of the offset has two values, one for each side.
    whole = tensors["offset"] == tensors["offset"].round()
    tensors["offset"] += 0.25 * whole
    return tensors, keywords


def run(
    tensors: dict[str, Tensor],
    keywords: dict[str, Any],
    backend: str,
    deterministic: bool = False,
    layout: str = "dense",
) -> dict[str, Tensor]:
    """Return output and gradients by name; the reference runs in float64 on the CPU."""
    reference = backend == "reference"
    device, dtype = ("cpu", torch.float64) if reference else (DEVICE, None)
    placed = {k: LAYOUTS[layout](v.detach().to(device, dtype)) for k, v in tensors.items()}
    grad = placed.pop("grad")
    leaves = {k: v.requires_grad_() for k, v in placed.items()}
    output = dcnv3(**leaves, **keywords, deterministic=deterministic, backend=backend)
    output.backward(grad.to(output))
    return {"output": output.detach()} | {f"grad_{k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    tensors, keywords = inputs_of(CASES[name])
    with poisoned():
        found = run(tensors, keywords, "triton")
    expected = run(tensors, keywords, "reference")
    for key, value in found.items():
        assert value.dtype == tensors["x"].dtype, key
    assert_close(found, expected, TOLERANCE[tensors["x"].dtype])


# How a tensor may lie in memory; all give the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "part of the channels": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "part of the rows": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "channels first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "rows and columns swapped": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}
FEW = {"deadline": None, "derandomize": True, "phases": (Phase.explicit, Phase.generate)}
SIDES = st.sampled_from([1, 3])
ODD = {"size": (2, 3, 2), "channels": 7, "groups": 3, "stride": (2, 1), "dilation": 2, "seed": 0}


@pytest.mark.slow
@settings(max_examples=5, **FEW)
@example(**ODD, kernel_size=(5, 3), remove_center=True, offset_scale=1.3, mask_is_logits=True,
         gated=False, layout="part of the channels")  # fmt: skip
@example(**(ODD | {"stride": (1, 1)}), kernel_size=(3, 3), remove_center=True, offset_scale=0.7,
         mask_is_logits=False, gated=True, layout="channels first")  # fmt: skip
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 20),
    groups=st.integers(1, 3),
    kernel_size=st.tuples(SIDES, SIDES),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    remove_center=st.booleans(),
    offset_scale=st.floats(0.5, 2.0),
    mask_is_logits=st.booleans(),
    gated=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_random_shapes(seed: int, layout: str, **case: Any) -> None:
    case["padding"] = tuple(case["dilation"] * (k // 2) for k in case["kernel_size"])
    case["remove_center"] &= case["kernel_size"] != (1, 1)
    case["gated"] &= case["stride"] == (1, 1)
    tensors, keywords = inputs_of(case, seed)
    with poisoned():
        found = run(tensors, keywords, "triton", layout=layout)
    assert_close(found, run(tensors, keywords, "reference"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", dcnv3_golden.CASES)
def test_agrees_with_the_original(name: str) -> None:
    inputs, keywords, expected = dcnv3_golden.load(name)
    found = run({k: v.float() for k, v in inputs.items()}, keywords, "triton")
    found["grad_input"] = found.pop("grad_x")
    assert_close(found, expected, TOLERANCE[torch.float32])


def test_fixed_point_gradient() -> None:
    """The deterministic gradient of x is correct, at any magnitude of the incoming gradient."""
    for magnitude in (1.0, 1e-12, 1e12):
        tensors, keywords = inputs_of({"gated": True, "size": (1, 3, 4)})
        expected = run(tensors, keywords, "reference")
        tensors["grad"] *= magnitude
        with poisoned():
            found = run(tensors, keywords, "triton", deterministic=True)
        found = {k: v if k == "output" else v / magnitude for k, v in found.items()}
        assert_close(found, expected, TOLERANCE[torch.float32])


def test_fixed_point_sum_does_not_depend_on_the_order() -> None:
    """All output positions read one pixel; reversing their order must not change a bit."""
    tensors, keywords = inputs_of({"size": (1, 1, 48), "kernel_size": 1, "padding": 0, "groups": 1})
    columns = torch.arange(48.0)
    tensors["offset"] = torch.stack((24.25 - columns, torch.zeros(48)), -1).view(1, 1, 48, 2)
    forward = run(tensors, keywords, "triton", deterministic=True)["grad_x"]
    tensors["grad"] = tensors["grad"].flip(2)
    assert torch.equal(run(tensors, keywords, "triton", deterministic=True)["grad_x"], forward)


def test_deterministic_backward_repeats() -> None:
    tensors, keywords = inputs_of({"size": (2, 3, 4), "far": 2.0})
    first, second = (run(tensors, keywords, "triton", deterministic=True) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_non_finite_gradient_stays_visible() -> None:
    tensors, keywords = inputs_of({"size": (1, 3, 3)})
    tensors["grad"][0, 1, 1, 0] = torch.inf
    found = run(tensors, keywords, "triton", deterministic=True)
    assert not found["grad_x"].isfinite().all()


def test_unreadable_offsets_give_zero() -> None:
    tensors, keywords = inputs_of({"size": (1, 3, 3), "mask_is_logits": False})
    tensors["offset"] = torch.full_like(tensors["offset"], 1e30)
    found = run(tensors, keywords, "triton")
    assert found["output"].abs().max() == 0
    assert found["grad_x"].abs().max() == 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dense"])
def test_strided_inputs(layout: str) -> None:
    """Views into larger tensors, and channels that are not neighbours in memory."""
    tensors, keywords = inputs_of(
        {"gated": True, "size": (2, 3, 4), "kernel_size": 1, "padding": 0}
    )
    found = run(tensors, keywords, "triton", layout=layout)
    assert_close(found, run(tensors, keywords, "reference"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_first_elements_off_alignment(dtype: torch.dtype) -> None:
    """Tensors that start one element into their storage: no pair, no word may be read whole."""
    case = {"dtype": dtype, "size": (1, 2, 3), "groups": 1, "kernel_size": 1, "padding": 0}
    tensors, keywords = inputs_of(case | {"mask_is_logits": False})
    shifted = {
        k: torch.cat((v.flatten()[:1], v.flatten())).to(DEVICE)[1:].view(v.shape)
        for k, v in tensors.items()
    }
    with poisoned():
        found = run(shifted, keywords, "triton")
    assert_close(found, run(tensors, keywords, "reference"), TOLERANCE[dtype])


def test_infinite_and_huge_offsets_read_nothing() -> None:
    """All points of these positions lie outside: zero output, zero gradients, as far away."""
    tensors, keywords = inputs_of({"size": (1, 2, 3), "groups": 1})
    far = torch.tensor([float("inf"), -float("inf"), 3e38, -1e10, 2.0**31, -(2.0**31)])
    tensors["offset"][:] = far.view(1, 2, 3, 1)
    found = run(tensors, keywords, "triton")
    for name, value in found.items():
        assert value.eq(0).all(), name


def test_a_pixel_that_is_not_finite_reaches_only_its_readers() -> None:
    """And no position that reads other pixels, whatever lies beside them outside the image."""
    tensors, keywords = inputs_of({"size": (1, 3, 4), "groups": 1, "kernel_size": 1, "padding": 0})
    tensors["offset"] *= 0
    tensors["x"][0, 1, 1] = float("nan")
    output = run(tensors, keywords, "triton")["output"].isnan().any(-1)[0]
    assert output[1, 1]
    assert not output[2:].any()
    assert not output[:, 2:].any()


def test_mixed_dtypes() -> None:
    tensors, keywords = inputs_of({"dtype": torch.float16})
    tensors["mask"] = tensors["mask"].float()
    found = run(tensors, keywords, "triton")
    assert found["grad_mask"].dtype == torch.float32
    assert found["grad_offset"].dtype == torch.float16
    assert_close(found, run(tensors, keywords, "reference"), TOLERANCE[torch.float16])


def test_beyond_32_bit_offsets() -> None:
    """Two images of two rows, 2**30 elements from row to row and 2**31 from image to image."""
    strides = (2**31, 2**30, 8, 1)
    length = 2**31 + 2**30 + 64
    if DEVICE.type == "cpu":  # numpy does not touch the pages in between
        buffer = torch.from_numpy(np.empty(length, np.float16))
    else:
        buffer = torch.empty(length, dtype=torch.float16, device=DEVICE)
    tensors, keywords = inputs_of({"size": (2, 2, 3), "groups": 1, "dtype": torch.float16})
    x = buffer.as_strided(tensors["x"].shape, strides).copy_(tensors["x"])
    leaves = [t.to(DEVICE).requires_grad_() for t in (x, tensors["offset"], tensors["mask"])]
    output = dcnv3(*leaves, **keywords, backend="triton")
    gradients = torch.autograd.grad(output, leaves, tensors["grad"].to(DEVICE))
    names = ("grad_x", "grad_offset", "grad_mask")
    found = {"output": output.detach()} | dict(zip(names, gradients, strict=True))
    assert_close(found, run(tensors, keywords, "reference"), TOLERANCE[torch.float16])


def _operator(tensors: dict[str, Tensor]) -> Tensor:
    return dcnv3(
        tensors["x"],
        tensors["offset"],
        tensors["mask"],
        center_scale=tensors["center_scale"],
        kernel_size=1,
        groups=2,
        mask_is_logits=True,
        backend="triton",
    )


@pytest.fixture
def leaves() -> dict[str, Tensor]:
    tensors, _ = inputs_of({"size": (1, 2, 3), "kernel_size": 1, "padding": 0, "gated": True})
    return {k: v.to(DEVICE).requires_grad_() for k, v in tensors.items() if k != "grad"}


def test_opcheck(leaves: dict[str, Tensor]) -> None:
    from m3i_kernels.dcnv3.op import dcnv3_op

    parameters = ([1, 1], [1, 1], [0, 0], [1, 1], 2, 1.0, False, True)
    for scale in (leaves["center_scale"], None):
        arguments = (leaves["x"], leaves["offset"], leaves["mask"], scale, *parameters, True)
        torch.library.opcheck(dcnv3_op, arguments)


def test_compiles_without_graph_breaks(leaves: dict[str, Tensor]) -> None:
    compiled = torch.compile(_operator, backend="aot_eager", fullgraph=True)
    gradient = torch.autograd.grad(_operator(leaves).square().sum(), leaves["x"])
    torch.testing.assert_close(compiled(leaves), _operator(leaves))
    found = torch.autograd.grad(compiled(leaves).square().sum(), leaves["x"])
    torch.testing.assert_close(found, gradient)


def test_activation_checkpointing(leaves: dict[str, Tensor]) -> None:
    plain = torch.autograd.grad(_operator(leaves).square().sum(), list(leaves.values()))
    y = checkpoint(_operator, leaves, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    torch.testing.assert_close(found, plain)


def test_autocast(leaves: dict[str, Tensor]) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        x = leaves["x"] @ torch.eye(leaves["x"].shape[-1], device=DEVICE)
        assert x.dtype == torch.bfloat16
        y = _operator(leaves | {"x": x})
    assert y.dtype == torch.bfloat16
    gradient = torch.autograd.grad(y.float().sum(), leaves["x"])[0]
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
