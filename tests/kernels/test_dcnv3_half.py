"""DCNv3 with corners blended in the type of x: its arithmetic, its error, where it applies."""

import logging
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from m3i_kernels import dcnv3
from m3i_kernels.dcnv3 import choice
from torch import Tensor

from helpers.kernel_checks import DEVICE, poisoned

ROOT = pathlib.Path(__file__).parents[2]
GROUPS, CHANNELS, SIZE, POINTS = 2, 32, (2, 6, 5), 9
HALF = (torch.bfloat16, torch.float16)


def inputs_of(dtype: torch.dtype, channels: int = CHANNELS, seed: int = 0) -> dict[str, Tensor]:
    """Normal values, offsets of 1.5 pixels; rounded to `dtype`, of which nothing is an error."""
    rng = torch.Generator().manual_seed(seed)
    N, H, W = SIZE

    def normal(width: int) -> Tensor:
        return torch.randn(N, H, W, width, generator=rng)

    tensors = {
        "x": normal(GROUPS * channels),
        "offset": 1.5 * normal(GROUPS * POINTS * 2),
        "mask": normal(GROUPS * POINTS),
        "center_scale": normal(GROUPS).sigmoid(),
    }
    return {name: t.to(dtype).to(DEVICE) for name, t in tensors.items()}


def run(tensors: dict[str, Tensor], **options: Any) -> Tensor:
    settings = {"kernel_size": 3, "padding": 1, "groups": GROUPS, "mask_is_logits": True}
    return dcnv3(**tensors, **(settings | {"backend": "triton"} | options))


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().double() for name, t in tensors.items()}


def written_out(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The documented arithmetic in torch, in float64 but for the roundings to `dtype`.

    (1 - s) * sum_k m_k v_k + s x, where v_k is the blend of four corners: weights rounded,
    v = round(w00 x00), v = round(w01 x01 + v), v = round(w10 x10 + v), v = round(w11 x11 + v).
    """

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).double()

    x, offset, logits, gate = double(tensors).values()
    N, H, W = SIZE
    x = x.view(N, H, W, GROUPS, -1)
    weights = logits.view(N, H, W, GROUPS, POINTS).softmax(-1)
    offset = offset.view(N, H, W, GROUPS, POINTS, 2)
    image, row, column, group = torch.meshgrid(
        *(torch.arange(n) for n in (N, H, W, GROUPS)), indexing="ij"
    )
    y = torch.zeros_like(x)
    for k in range(POINTS):
        at_x = column + k // 3 - 1 + offset[..., k, 0]
        at_y = row + k % 3 - 1 + offset[..., k, 1]
        left, top = at_x.floor(), at_y.floor()
        value = torch.zeros_like(x)
        for down in (0, 1):
            for right in (0, 1):
                i, j = (top + down).long(), (left + right).long()
                inside = (i >= 0) & (i < H) & (j >= 0) & (j < W)
                share_y = at_y - top if down else 1 - (at_y - top)
                share_x = at_x - left if right else 1 - (at_x - left)
                corner = x[image, i.clamp(0, H - 1), j.clamp(0, W - 1), group]
                weight = rounded(share_y * share_x * inside)
                value = rounded(weight[..., None] * corner + value)
        y += weights[..., k, None] * value
    y = (1 - gate[..., None]) * y + gate[..., None] * x
    return y.flatten(-2)


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALF)
def test_the_arithmetic_is_the_documented_one(dtype: torch.dtype) -> None:
    tensors = inputs_of(dtype)
    with poisoned():
        found = run(tensors, half_blend=True)
    expected = written_out(tensors, dtype)
    # To the rounding of the result: the interpreter truncates to bfloat16, up to twice as much.
    step = torch.finfo(dtype).eps
    off = (found.cpu().double() - expected).abs()
    assert (off <= 1.1 * step * expected.abs() + 1e-5).float().mean() > 0.998
    assert off.max() < 4 * step * expected.abs().max()


# (dtype, gated): of the blend alone, and with the rounding of the result, which alone is 1.7e-3 in
# bfloat16 and 2.1e-4 in float16. Measured: 7.3e-4, 1.8e-3; 2.6e-3, 3.1e-3; 9e-5, 2.2e-4; 3.3e-4,
# 3.9e-4. The gate blends with x itself, which has no error.
ERRORS = {
    (torch.bfloat16, True): (1e-3, 2.1e-3),
    (torch.bfloat16, False): (3e-3, 3.6e-3),
    (torch.float16, True): (1.2e-4, 2.6e-4),
    (torch.float16, False): (4e-4, 4.6e-4),
}


@pytest.mark.parametrize("case", ERRORS)
def test_its_error_against_float64(case: tuple[torch.dtype, bool]) -> None:
    dtype, gated = case
    blend, whole = ERRORS[case]
    for seed in range(3):
        tensors = inputs_of(dtype, seed=seed)
        tensors["center_scale"] *= gated
        exact = run(double(tensors), backend="reference")
        found = written_out(tensors, dtype)
        assert error(exact.to(dtype), exact) < error(found.to(dtype), exact) < whole
        assert 0.5 * blend < error(found, exact) < blend


def test_whole_pixels_are_read_exactly() -> None:
    """Weights 1, 0, 0, 0: nothing is rounded but the result."""
    tensors = inputs_of(torch.float16)
    tensors["offset"] = tensors["offset"].round()
    assert torch.equal(run(tensors, half_blend=True), run(tensors))


def test_gradients_are_those_without_it() -> None:
    """But for the logits', whose softmax starts from the output."""
    tensors = inputs_of(torch.bfloat16)
    rng = torch.Generator().manual_seed(1)
    incoming = torch.randn(tensors["x"].shape, generator=rng).to(DEVICE, torch.bfloat16)

    def gradients(half: bool, **options: Any) -> dict[str, Tensor]:
        chosen = double(tensors) if options else tensors
        leaves = {name: t.clone().requires_grad_() for name, t in chosen.items()}
        y = run(leaves, half_blend=half, deterministic=True, **options)
        y.backward(incoming.to(y))
        return {name: t.grad for name, t in leaves.items() if t.grad is not None}

    plain, half, exact = gradients(False), gradients(True), gradients(False, backend="reference")
    for name in ("x", "offset", "center_scale"):
        assert torch.equal(plain[name], half[name]), name
    assert not torch.equal(plain["mask"], half["mask"])
    assert error(half["mask"], exact["mask"]) < 1.5 * error(plain["mask"], exact["mask"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "x is float32"),
        ({"channels": 12}, "multiples of 8 elements"),
    ],
)
def test_where_it_cannot_it_blends_in_float32_and_says_so(
    change: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = inputs_of(**({"dtype": torch.bfloat16} | change))
    choice.set_algorithm("auto")  # and forget what has been logged
    with caplog.at_level(logging.INFO, "m3i_kernels.dcnv3.choice"):
        found = run(tensors, half_blend=True)
    assert torch.equal(found, run(tensors))
    assert "blends corners in float32 (" in caplog.text
    assert why in caplog.text


def test_where_it_can_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tensors = inputs_of(torch.bfloat16)
    choice.set_algorithm("auto")
    with caplog.at_level(logging.INFO, "m3i_kernels.dcnv3.choice"):
        changed = run(tensors, half_blend=True)
    assert not torch.equal(changed, run(tensors))
    assert "blends corners in half precision (as asked)" in caplog.text


def test_the_reference_and_the_default_do_not_know_it() -> None:
    tensors = inputs_of(torch.bfloat16)
    reference = run(tensors, backend="reference")
    assert torch.equal(run(tensors, backend="reference", half_blend=True), reference)
    assert torch.equal(run(tensors, half_blend=False), run(tensors))


@pytest.mark.parametrize(
    ("device", "reason"), [((9, 0), None), ((7, 5), "8.0 or later"), (None, "8.0 or later")]
)
def test_the_device_decides(
    monkeypatch: pytest.MonkeyPatch, device: tuple[int, int] | None, reason: str | None
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(choice, "capability_of", lambda _: device)
    found = choice.half_obstacle(inputs_of(torch.bfloat16)["x"], is_words=True)
    assert found is None if reason is None else reason in (found or "")


PROGRAM = """
import importlib, re, torch, compile_only
from m3i_kernels.dcnv3.geometry import make_geometry
op = importlib.import_module("m3i_kernels.dcnv3.op")
for dtype, targets in ((torch.bfloat16, ("sm_80", "sm_90", "sm_100")), (torch.float16, ("sm_90",))):
    x, offset, mask, gate = (
        torch.empty(8, 12, 12, width, dtype=dtype, device="meta") for width in (320, 180, 90, 10)
    )
    for target in targets:
        with compile_only.record(op) as launches:
            tiles = op.choose_tiles(32, 9, False, half=True)
            geometry = make_geometry(3, 1, 1, 1, 10, 1.0, False)
            op.launch_forward((x, offset, mask, gate), x, geometry, True, tiles, True)
        compiled = compile_only.compiled_for(launches[0], target)
        found = compile_only.read_cubin(compiled)
        code = "".join(compile_only._disassemble(compiled.asm["cubin"]))
        results = tiles.BLOCK_P * 32 / (32 * tiles.num_warps)  # of a thread
        packed = len(re.findall("H(?:FMA|MUL)2", code)) / results
        print(found.instructions / results, packed, found.spilled_bytes, found.in_loops)
"""


@pytest.mark.cpu_only
def test_packed_instructions_come_out_without_spills() -> None:
    """Four corners of nine points are 18 packed products a result; 147 instructions without."""
    path = os.pathsep.join(str(ROOT / name) for name in ("kernels", "kernels/bench"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for instructions, packed, spilled, in_loops in lines:
        assert instructions < 95
        assert packed >= 15
        assert spilled == in_loops == 0
