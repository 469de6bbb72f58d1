"""The reference operator against the original implementation's stored outputs and gradients."""

import pytest
import torch
from m3i_kernels import dcnv3

from helpers import dcnv3_golden as golden


@pytest.mark.parametrize("name", golden.CASES)
# Measured: 6e-7 in both. The original places its grid in float32 even when it computes in float64.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 3e-6)])
def test_agrees_with_the_original(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs, keywords, expected = golden.load(name)
    x, offset, mask = (
        inputs[k].to(dtype).detach().requires_grad_() for k in ("x", "offset", "mask")
    )
    output = dcnv3(x, offset, mask, **keywords, backend="reference")
    output.backward(inputs["grad"].to(dtype))
    found = {
        "output": output,
        "grad_input": x.grad,
        "grad_offset": offset.grad,
        "grad_mask": mask.grad,
    }
    for key, value in expected.items():
        error = (found[key].double() - value).norm() / value.norm()
        assert error < tolerance, f"{key}: {error:.1e}"
