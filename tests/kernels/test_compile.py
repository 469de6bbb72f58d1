"""What needs a compiler and no GPU: variants that the interpreter accepts and a Triton may not."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def test_64_bit_offsets_compile() -> None:
    """Forward, backward and the deterministic backward, row strides of 32 and of 64 bits."""
    path = os.pathsep.join(str(ROOT / "kernels" / name) for name in ("", "bench"))
    done = subprocess.run(
        [sys.executable, HERE / "wide_checks.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 6
