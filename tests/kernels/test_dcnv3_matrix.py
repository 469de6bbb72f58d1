"""The matrix kernels of DCNv3: values, limits and the rule that chooses them.

On a GPU with Triton 3.8 or later they run there, without a GPU in an emulator of Gluon.
"""

import json
import logging
import pathlib
from typing import Any

import pytest
import torch
from m3i_kernels import dcnv3, set_dcnv3_algorithm
from m3i_kernels.dcnv3 import choice, matrix_op
from m3i_kernels.dcnv3.geometry import Geometry, make_geometry
from m3i_kernels.dcnv3.reference import dcnv3_reference
from torch import Tensor

from helpers.interpreted import emulated_matrix_kernels
from helpers.kernel_checks import DEVICE, assert_close, poisoned

D, K = 32, 9
BF16 = torch.bfloat16
# ||found - expected|| / ||expected||; rounding a result to bfloat16 alone is 1.7e-3.
TOLERANCE = 4e-3
NATIVE = DEVICE.type == "cuda"


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """The kernels, compiled on a GPU and emulated elsewhere."""
    if NATIVE:
        if choice.triton_version() < (3, 8):
            pytest.skip("the matrix kernels need Triton 3.8")
        return matrix_op.kernels()
    return emulated_matrix_kernels()


@pytest.fixture
def runnable(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `algorithm="matrix"` run here."""
    monkeypatch.setattr(matrix_op, "kernels", lambda: kernels)
    if not NATIVE:
        monkeypatch.setattr(choice, "capability_of", lambda device: (9, 0))
        monkeypatch.setattr(choice, "triton_version", lambda: (3, 8))


def make_inputs(
    size: tuple[int, int, int],
    groups: int = 1,
    gated: bool = True,
    spread: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random bfloat16 tensors on the CPU; `spread` is the deviation of offsets in pixels."""
    rng = torch.Generator().manual_seed(seed)

    def normal(channels: int) -> Tensor:
        return torch.randn(*size, channels, generator=rng)

    tensors = {
        "x": normal(groups * D),
        "offset": spread * normal(groups * K * 2),
        "mask": 2 * normal(groups * K),
        "grad": normal(groups * D),
    }
    if gated:
        tensors["center_scale"] = normal(groups).sigmoid()
    tensors = {k: v.to(BF16) for k, v in tensors.items()}
    # On whole pixels the gradient of the offset has two values, one for each side.
    tensors["offset"] += 0.25 * (tensors["offset"] == tensors["offset"].round())
    return tensors


def run(tensors: dict[str, Tensor], groups: int = 1, **keywords: Any) -> dict[str, Tensor]:
    """Return output and gradients of the matrix kernels by name."""
    leaves = {k: v.detach().to(DEVICE).requires_grad_() for k, v in tensors.items() if k != "grad"}
    return run_leaves(leaves, tensors["grad"], groups, **keywords)


def run_leaves(
    leaves: dict[str, Tensor], grad: Tensor, groups: int, **keywords: Any
) -> dict[str, Tensor]:
    """Run the public function on tensors that require gradients."""
    defaults = {"kernel_size": 3, "padding": 1, "mask_is_logits": True, "backend": "triton"}
    keywords = defaults | {"algorithm": "matrix"} | keywords
    with poisoned():
        y = dcnv3(**leaves, groups=groups, **keywords)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad.to(DEVICE))
    assert all(g.dtype == BF16 for g in (y, *gradients))
    found = {"output": y.detach()}
    return found | {f"grad_{k}": g for k, g in zip(leaves, gradients, strict=True)}


def exact(
    tensors: dict[str, Tensor], groups: int = 1, dilation: int = 1, offset_scale: float = 1.0
) -> dict[str, Tensor]:
    """The float64 reference."""
    leaves = {k: v.detach().double().requires_grad_() for k, v in tensors.items() if k != "grad"}
    geometry = make_geometry(3, 1, dilation, dilation, groups, offset_scale, False)
    inputs = (leaves["x"], leaves["offset"], leaves["mask"])
    y = dcnv3_reference(*inputs, geometry, True, leaves.get("center_scale"))
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors["grad"].double())
    found = {"output": y.detach()}
    return found | {f"grad_{k}": g for k, g in zip(leaves, gradients, strict=True)}


CASES: dict[str, dict[str, Any]] = {
    "12 x 12": {"size": (1, 12, 12)},
    "6 x 6, groups and images": {"size": (2, 6, 6), "groups": 3},
    "7 x 7, odd width": {"size": (1, 7, 7), "groups": 2},
    "14 x 14": {"size": (1, 14, 14)},
    "16 x 16, as large as it may be": {"size": (1, 16, 16)},
    "4 x 4, as small as it may be": {"size": (3, 4, 4)},
    "1 x 17": {"size": (1, 1, 17)},
    "17 x 1": {"size": (1, 17, 1)},
    "9 x 20": {"size": (1, 9, 20)},
    "without gate": {"size": (1, 5, 8), "groups": 2, "gated": False},
    "far offsets": {"size": (1, 12, 12), "spread": 8.0},
    "mostly outside": {"size": (1, 6, 6), "groups": 2, "spread": 50.0},
    "no offsets to speak of": {"size": (1, 6, 6), "spread": 0.01},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("runnable")
def test_values_and_gradients(name: str) -> None:
    case = CASES[name]
    groups = case.get("groups", 1)
    tensors = make_inputs(**case)
    assert_close(run(tensors, groups), exact(tensors, groups), TOLERANCE)


@pytest.mark.parametrize("tiles", [(32, 1), (32, 2), (64, 2), (64, 4)])
@pytest.mark.usefixtures("runnable")
def test_every_tile(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = matrix_op.MatrixTiles(*tiles)
    monkeypatch.setattr(matrix_op, "choose_matrix_tiles", lambda pixels, backward: chosen)
    tensors = make_inputs((1, 9, 10), 2, seed=3)
    assert_close(run(tensors, 2), exact(tensors, 2), TOLERANCE)


MEASURED = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu_session" / "results"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_shipped_tile_is_the_fastest_measured(direction: str) -> None:
    lines = (MEASURED / "2026-11-26_h100_first" / "matrix.log").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if r.get("direction") == direction]
    times = [r for r in rows if r.get("kernel") == "matrix"]
    for size, name in ((12, "192 stage 3"), (6, "192 stage 4"), (14, "224 stage 3"),
                       (7, "224 stage 4")):  # fmt: skip
        fastest = min((r for r in times if r["time"] == name), key=lambda r: r["ms"])
        chosen = matrix_op.choose_matrix_tiles(size * (size + size % 2), direction == "backward")
        assert chosen == (fastest["P"], fastest["NW"]), name


@pytest.mark.usefixtures("runnable")
def test_dilation_and_offset_scale() -> None:
    tensors = make_inputs((1, 8, 6), 2)
    found = run(tensors, 2, dilation=2, padding=2, offset_scale=1.5)
    assert_close(found, exact(tensors, 2, dilation=2, offset_scale=1.5), TOLERANCE)


@pytest.mark.usefixtures("runnable")
def test_strided_inputs() -> None:
    """Parts of wider tensors, as one projection gives them, and layouts that must be copied."""
    tensors = make_inputs((2, 4, 6), 2)
    expected = exact(tensors, 2)
    names = [n for n in tensors if n != "grad"]
    wide = torch.cat([tensors[n] for n in names], -1).to(DEVICE)
    parts = wide.split([tensors[n].shape[-1] for n in names], -1)
    views = dict(zip(names, parts, strict=True))
    swapped = {n: tensors[n].to(DEVICE).mT.contiguous().mT for n in names}
    rows = {n: torch.cat((tensors[n],) * 2, 1).to(DEVICE)[:, :4] for n in names}
    for layout in (views, swapped, rows):
        leaves = {k: v.detach().requires_grad_() for k, v in layout.items()}
        assert_close(run_leaves(leaves, tensors["grad"], 2), expected, TOLERANCE)
    grad = tensors["grad"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert_close(run(tensors | {"grad": grad}, 2), expected, TOLERANCE)


@pytest.mark.usefixtures("runnable")
def test_all_weight_on_one_pixel() -> None:
    """The fixed-point sum at its largest: 9 points and the gate on one pixel, no overflow."""
    tensors = make_inputs((1, 4, 4))
    points = torch.tensor([(i // 3 - 1, i % 3 - 1) for i in range(K)]).flatten()
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    center = place.repeat(1, 1, K)
    for target in (0, 3):
        tensors["offset"] = (target - center - points).to(BF16)[None]
        found, expected = run(tensors), exact(tensors)
        for name in ("output", "grad_x", "grad_mask", "grad_center_scale"):  # kinks elsewhere
            assert_close({name: found[name]}, {name: expected[name]}, TOLERANCE)


@pytest.mark.usefixtures("runnable")
def test_large_and_small_values() -> None:
    for magnitude in (1e-20, 1e20):
        tensors = make_inputs((1, 4, 5))
        expected = exact(tensors)
        tensors["grad"] = (tensors["grad"].float() * magnitude).to(BF16)
        found = run(tensors)
        scaled = {k: v if k == "output" else v.double() / magnitude for k, v in found.items()}
        assert_close(scaled, expected, 6e-3)  # grad was rounded once more
    tensors = make_inputs((1, 4, 5))
    tensors["mask"] = (tensors["mask"].float() * 1e4).to(BF16)
    assert_close(run(tensors), exact(tensors), TOLERANCE)


@pytest.mark.usefixtures("runnable")
def test_repeats_bit_for_bit() -> None:
    tensors = make_inputs((2, 6, 6), 2)
    first, second = run(tensors, 2), run(tensors, 2)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("runnable")
def test_non_finite_pixel_poisons_its_channel(value: float) -> None:
    tensors = make_inputs((2, 4, 4), 2)
    clean = run(tensors, 2)
    tensors["x"][0, 1, 2, 40] = value
    found = run(tensors, 2)
    assert not found["output"][0, ..., 40].isfinite().any()
    found["output"][0, ..., 40] = clean["output"][0, ..., 40]
    assert torch.equal(found["output"], clean["output"])
    assert torch.equal(found["grad_x"], clean["grad_x"])
    assert torch.equal(found["grad_offset"][1], clean["grad_offset"][1])
    assert not found["grad_offset"][0].isfinite().all()


@pytest.mark.usefixtures("runnable")
def test_non_finite_gradient_poisons_its_channel() -> None:
    tensors = make_inputs((2, 4, 4), 2)
    clean = run(tensors, 2)
    tensors["grad"][0, 1, 2, 40] = torch.inf
    found = run(tensors, 2)
    assert not found["grad_x"][0, ..., 40].isfinite().any()
    found["grad_x"][0, ..., 40] = clean["grad_x"][0, ..., 40]
    assert torch.equal(found["grad_x"], clean["grad_x"])
    assert not found["grad_mask"][0, 1, 2, K:].isfinite().any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask", torch.nan), ("mask", torch.inf), ("center_scale", torch.nan)]
    + [("center_scale", v) for v in (-0.1, 1.01, torch.inf)],
)
@pytest.mark.usefixtures("runnable")
def test_weights_without_a_sum_of_one_are_loud(name: str, value: float) -> None:
    """Fixed point cannot hold them: the position is NaN, and dx of its image and group."""
    tensors = make_inputs((2, 4, 4), 2)
    clean = run(tensors, 2)
    tensors[name][1, 2, 3, 0] = value
    found = run(tensors, 2)
    for key, width in (("output", D), ("grad_offset", 2 * K), ("grad_mask", K)):
        assert found[key][1, 2, 3, :width].isnan().all(), key
        found[key][1, 2, 3, :width] = clean[key][1, 2, 3, :width]
        assert torch.equal(found[key], clean[key]), key
    assert found["grad_center_scale"][1, 2, 3, 0].isnan()
    assert found["grad_x"][1, ..., :D].isnan().all()
    found["grad_x"][1, ..., :D] = clean["grad_x"][1, ..., :D]
    assert torch.equal(found["grad_x"], clean["grad_x"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.usefixtures("runnable")
def test_unreadable_offsets_read_nothing(value: float) -> None:
    tensors = make_inputs((1, 4, 4), gated=False)
    tensors["offset"][:] = value
    found = run(tensors)
    assert all(found[k].abs().max() == 0 for k in found)


GEOMETRY = make_geometry(3, 1, 1, 1, 4, 1.0, False)
RULE: dict[str, Any] = {
    "size": (12, 12),
    "channels": 32,
    "dtypes": {BF16},
    "geometry": GEOMETRY,
    "mask_is_logits": True,
    "triton_version": (3, 8),
    "capability": (9, 0),
}


def _geometry(**changes: Any) -> dict[str, Geometry]:
    return {"geometry": GEOMETRY._replace(**changes)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "matrix"),
        ({"size": (16, 16)}, "matrix"),
        ({"size": (6, 6)}, "matrix"),
        ({"size": (4, 64)}, "matrix"),
        ({"triton_version": (4, 0)}, "matrix"),
        ({"capability": (8, 0)}, "matrix"),
        ({"capability": (10, 0)}, "matrix"),
        (_geometry(dilation=(2, 2), padding=(2, 2)), "matrix"),
        ({"size": (24, 24)}, "gather"),
        ({"size": (16, 17)}, "gather"),
        ({"size": (17, 15)}, "gather"),  # 17 rows of 16: the odd width counts as one more
        ({"size": (3, 3)}, "gather"),
        ({"channels": 16}, "gather"),
        ({"dtypes": {torch.float16}}, "gather"),
        ({"dtypes": {BF16, torch.float32}}, "gather"),
        ({"mask_is_logits": False}, "gather"),
        ({"triton_version": (3, 7)}, "gather"),
        ({"capability": (7, 5)}, "gather"),
        ({"capability": None}, "gather"),
        (_geometry(stride=(2, 2)), "gather"),
        (_geometry(padding=(0, 0)), "gather"),
        (_geometry(kernel_size=(5, 5), padding=(2, 2)), "gather"),
        (_geometry(remove_center=True), "gather"),
    ],
)
def test_rule(change: dict[str, Any], expected: str) -> None:
    call = choice.Call(**(RULE | change))
    assert choice.choose(call) == expected
    assert (choice.obstacle(call) is None) == (expected == "matrix")


def test_forced_where_it_cannot_run() -> None:
    tensors = make_inputs((1, 3, 3))
    with pytest.raises(ValueError, match=r'algorithm is "matrix".*it needs 16 to 256 positions'):
        run(tensors)
    with pytest.raises(ValueError, match="algorithm is 'fast', but must be one of"):
        run(tensors, algorithm="fast")
    with pytest.raises(ValueError, match="must be one of auto, gather, matrix"):
        set_dcnv3_algorithm("fast")


@pytest.mark.usefixtures("runnable")
def test_choice_is_logged_once_and_can_be_forced(caplog: pytest.LogCaptureFixture) -> None:
    tensors = make_inputs((1, 4, 4))
    matrix = run(tensors)["output"]
    try:
        set_dcnv3_algorithm("gather")
        gather = run(tensors, algorithm="auto")["output"]
        assert not torch.equal(gather, matrix)
        set_dcnv3_algorithm("auto")
        with caplog.at_level(logging.INFO, logger="m3i_kernels"):
            for _ in range(2):
                assert torch.equal(run(tensors, algorithm="auto")["output"], matrix)
                assert torch.equal(run(tensors, algorithm="gather")["output"], gather)
    finally:
        set_dcnv3_algorithm("auto")
    lines = [m for m in caplog.messages if m.startswith("dcnv3 at")]
    assert lines == [
        "dcnv3 at 4 x 4, 32 channels in 1 groups: matrix kernel (the shape rule allows it)",
        "dcnv3 at 4 x 4, 32 channels in 1 groups: gather kernel (as asked)",
    ]
