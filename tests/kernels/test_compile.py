"""What needs a compiler and no GPU: variants that the interpreter accepts and a Triton may not."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_64_bit_offsets_compile() -> None:
    """Forward, backward and the deterministic backward, row strides of 32 and of 64 bits."""
    path = os.pathsep.join(str(ROOT / name) for name in ("kernels", "kernels/bench", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "helpers.wide_checks"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 6
