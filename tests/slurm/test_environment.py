"""What slurm/common.sh gives the ranks; Slurm itself is not needed."""

from __future__ import annotations

import os
import subprocess

import pytest

from helpers.slurm_cluster import REPOSITORY

SOURCE = (
    'scontrol() { echo n1; }; srun_options=(); source slurm/common.sh; echo "$TRITON_CACHE_DIR"'
)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, f"/tmp/triton-{os.getuid()}-77"),
        ({"TMPDIR": "/local/scratch"}, f"/local/scratch/triton-{os.getuid()}-77"),
        ({"TRITON_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_compiled_kernels_are_kept_on_the_node(given: dict[str, str], wanted: str):
    here = {k: v for k, v in os.environ.items() if k not in ("TMPDIR", "TRITON_CACHE_DIR")}
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash", "-c", SOURCE], cwd=REPOSITORY, env=here | job | given, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == wanted, done.stderr
