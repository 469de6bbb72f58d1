"""The package as others see it: its public names, its version, and the files that it ships."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import m3i_scale

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_light_and_each_name_comes_when_it_is_used():
    code = """
import sys
import m3i_scale
heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'deepspeed', 'm3i_scale.config'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert m3i_scale.__version__
assert set(m3i_scale.__all__) <= set(dir(m3i_scale))
assert not heavy & set(sys.modules), 'dir() imported'
m3i_scale.load_config
assert 'torch' not in sys.modules, 'a configuration needs no torch'
for name in m3i_scale.__all__:
    assert getattr(m3i_scale, name) is getattr(m3i_scale, name)
assert 'torch' in sys.modules
assert 'deepspeed' not in sys.modules
"""
    python(code)


def test_public_names_are_those_of_their_modules():
    from m3i_scale.config import load_config
    from m3i_scale.models.backbone import build_backbone
    from m3i_scale.models.weights import load_published
    from m3i_scale.transfer.export import load_backbone

    assert m3i_scale.load_config is load_config
    assert m3i_scale.build_backbone is build_backbone
    assert m3i_scale.load_published is load_published
    assert m3i_scale.load_backbone is load_backbone


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_confg'"):
        m3i_scale.load_confg  # noqa: B018


def test_the_version_stands_the_same_everywhere():
    version = m3i_scale.__version__
    places = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## (\d\S*)",  # the newest comes first
    }
    for name, pattern in places.items():
        found = re.search(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert found is not None, name
        assert found[1] == version, name


def test_the_python_of_the_readme_runs(tmp_path: Path):
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 8
        assert "torch.Size([1, 144, 1024])" in python(block)


def test_built_packages_carry_their_type_marker(tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77")
    build = ["setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "build_py"]
    command = [sys.executable, *build, "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for package in ("m3i_scale", "m3i_kernels"):
        assert (tmp_path / "lib" / package / "py.typed").is_file()
