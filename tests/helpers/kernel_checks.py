"""What the kernel tests share: the device, poisoned outputs, comparison by name."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Largest ||found - expected|| / ||expected|| against float64, any output or gradient of any case
# here. Measured in the interpreter: float32 1e-6, float16 6e-4, bfloat16 1.1e-2 (the gradient of
# logits; 4e-3 the others). Half precision is the rounding of results, and of the output that the
# softmax's gradient starts from; the interpreter truncates to bfloat16, which makes it a bias.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that torch hands out uninitialised with NaN (whole numbers: the maximum)."""
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensors by name in the norm, relative to the expected; NaN never passes.

    Everything compared here is of order 1: where a gradient vanishes (the softmax of one point),
    the error is relative to a tenth instead.
    """
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        difference = found[name].to("cpu", torch.float64) - value.cpu().double()
        size = value.norm().clamp(min=0.1 * value.numel() ** 0.5)
        errors[name] = (difference.norm() / size).item()
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance:.0e}: {wrong}"
