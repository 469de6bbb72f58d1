"""The linear layer of ZeRO-3: values and gradients of torch's, and no pass for the bias alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_scale.engine.linear import linear

IN, OUT = 24, 40


class Recorded(TorchDispatchMode):
    """Names of all operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(  # type: ignore[override]
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def drawn(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = ((*shape, IN), (OUT, IN), (OUT,))
    return [torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in sizes]


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 2, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], dtype: torch.dtype, biased: bool):
    x, weight, bias = drawn(*shape, dtype=dtype)
    leaves = [x, weight, *([bias] if biased else [])]
    found, expected = linear(*leaves), F.linear(*leaves)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(linear(*leaves), expected)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, leaves, gradient)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves, gradient), strict=True):
        torch.testing.assert_close(one, other)
    if x.dim() > 1:
        theirs = zero3_linear_wrap(*leaves)
        # bf16: DeepSpeed rounds the product before it adds the bias.
        torch.testing.assert_close(
            theirs, found, rtol=2e-2, atol=6e-2 if dtype.itemsize == 2 else 0
        )
        same = zip(gradients, torch.autograd.grad(theirs, leaves, gradient), strict=True)
        assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("records", [True, False])
def test_the_bias_is_added_inside_the_product(records: bool):
    leaves = drawn(2, 4, 4, dtype=torch.bfloat16)
    with torch.set_grad_enabled(records), Recorded() as seen:
        linear(*leaves)
    assert seen.names.count("addmm") == 1
    assert not {"add", "add_", "mm", "bmm", "clone", "copy_"} & set(seen.names)
