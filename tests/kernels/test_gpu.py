"""What the interpreter cannot show: races of real thread blocks, at InternImage-H's sizes."""

import pytest
import torch
from m3i_kernels import dcnv3
from torch import Tensor

pytestmark = pytest.mark.gpu
SIDE, CHANNELS, GROUPS = 48, 320, 10  # stage 1 at 192 pixels


def gradients(leaves: list[Tensor], grad: Tensor, deterministic: bool) -> tuple[Tensor, ...]:
    x, offset, mask = leaves
    output = dcnv3(
        x, offset, mask, kernel_size=3, padding=1, groups=GROUPS, mask_is_logits=True,
        deterministic=deterministic, backend="triton",
    )  # fmt: skip
    return torch.autograd.grad(output, leaves, grad)


@pytest.fixture
def leaves() -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    channels = (CHANNELS, GROUPS * 9 * 2, GROUPS * 9)
    return [
        torch.randn((8, SIDE, SIDE, c), device="cuda", generator=generator)
        .to(torch.bfloat16)
        .requires_grad_()
        for c in channels
    ]


def test_deterministic_gradients_repeat_bit_for_bit(leaves: list[Tensor]) -> None:
    grad = torch.randn_like(leaves[0])
    first = gradients(leaves, grad, True)
    for _ in range(20):
        again = gradients(leaves, grad, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_atomic_gradients_are_the_deterministic_ones_up_to_rounding(leaves: list[Tensor]) -> None:
    grad = torch.randn_like(leaves[0])
    pairs = zip(gradients(leaves, grad, True), gradients(leaves, grad, False), strict=True)
    for exact, atomic in pairs:
        assert (exact - atomic).float().norm() < 1e-2 * exact.float().norm()
