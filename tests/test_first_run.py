"""docs/first_run.md: all of its commands run, in their order, and end with a table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first_run.md"


def commands() -> list[str]:
    """The shell blocks of the page."""
    return re.findall(r"^```bash\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a fresh checkout, with `m3i` and `python` of this interpreter."""
    folder = tmp_path / "checkout"
    programs = folder / ".programs"
    programs.mkdir(parents=True)
    for name in ("m3i_scale", "kernels"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, words in (("python", ""), ("m3i", "-m m3i_scale.cli ")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        program.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs(checkout: Path):
    environment = {
        **os.environ,
        "PATH": f"{checkout / '.programs'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    printed = ""
    assert len(commands()) >= 9
    for block in commands():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr[-3000:]}"
        printed += done.stdout
    print(printed)
    assert "720 samples, 0 bad" in printed
    assert "torch.Size([1, 128])" in printed
    rows = json.loads((checkout / "runs/mine/eval.json").read_text())["rows"]
    table = {row["task"]: row for row in rows}
    for task in table:  # the page's table has the rows of the program's
        assert task in PAGE.read_text("utf-8")
    shape = table["zero-shot shape, top-1"]
    assert shape["trained"] > 2 * max(shape["untrained"], shape["chance"])
