"""One explicit choice of implementation, reported once, without silent fallback."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from m3i_kernels import active_backend, dcnv3, set_backend


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = active_backend()
    yield
    set_backend(before)


def call(backend: str = "auto") -> torch.Tensor:
    x, offset, mask = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 1)
    return dcnv3(x, offset, mask, kernel_size=1, groups=1, backend=backend)


def test_the_choice_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    set_backend("reference")
    with caplog.at_level(logging.INFO, "m3i_kernels"):
        call()
        call()
    assert [r.getMessage() for r in caplog.records] == [
        "m3i_kernels backend: reference -> reference on cpu"
    ]


def test_the_process_wide_choice_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    for name, message in (("auto", "auto -> reference"), ("triton", "triton -> triton (inter")):
        if name == "triton" and torch.cuda.is_available():
            continue  # no interpreter here, and the tensors are on the CPU
        set_backend(name)
        assert active_backend() == name
        caplog.clear()
        with caplog.at_level(logging.INFO, "m3i_kernels"):
            call()
        assert message in caplog.text


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend is 'fast', but must be one of auto, triton"):
        set_backend("fast")


def test_triton_on_cpu_tensors_does_not_fall_back() -> None:
    """In a process without the interpreter."""
    program = (
        "import torch; from m3i_kernels import dcnv3; z = torch.zeros(1, 2, 2, 4); "
        "dcnv3(z, z[..., :2], z[..., :1], kernel_size=1, groups=1, backend='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode != 0
    assert 'ValueError: backend is "triton", but the tensors are on cpu' in done.stderr
