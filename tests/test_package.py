"""The package as others see it: its public names, its version, and the files that it ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import m3i_scale
from m3i_scale import cli, demo, train
from m3i_scale.config import ConfigError, load_config

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
import m3i_scale.data, m3i_scale.shards.commands
slow = {'torchvision', 'torch._dynamo', 'transformers', 'timm', 'deepspeed'} & set(sys.modules)
assert not slow, f'reading data needs none of {slow}'
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the built wheel, as pip would lay them down."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder),
        "build", "--build-base", str(folder / "build"),
        "bdist_wheel", "--bdist-dir", str(folder / "tree"), "--dist-dir", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_the_packages_and_every_configuration(wheel: Path):
    for package in ("m3i_scale", "m3i_kernels"):
        assert (wheel / package / "py.typed").is_file()
        modules = {path.relative_to(wheel) for path in (wheel / package).rglob("*.py")}
        home = ROOT if package == "m3i_scale" else ROOT / "kernels"
        assert modules == {path.relative_to(home) for path in (home / package).rglob("*.py")}
    shipped = wheel / "m3i_scale" / "configs"
    here = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*")}
    assert {path.relative_to(shipped) for path in shipped.rglob("*.*")} == here
    assert not (wheel / "configs").exists()


def installed(wheel: Path, cwd: Path, code: str) -> str:
    """What code prints where only the wheel is installed, without a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_is_enough_to_read_every_configuration_by_name(wheel: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("base: [m3i:demo, 'm3i:methods/mim_pixel']\nrun: mine\n")
    code = f"""
import m3i_scale
from m3i_scale.config import shipped
assert m3i_scale.__file__.startswith({str(wheel)!r})
assert str(shipped.folder()).startswith({str(wheel)!r})
for name in shipped.names():
    if name.startswith(("pretrain_", "demo", "h_on_cpu")):
        print(m3i_scale.load_config("m3i:" + name).run)
mine = m3i_scale.load_config("mine.yaml", ["seed=3"])
print(mine.run, mine.objective.targets[0].representation, mine.seed)
"""
    said = installed(wheel, tmp_path, code).splitlines()
    assert said[-1] == "mine pixels 3"
    named = ("pretrain_*.yaml", "demo*.yaml", "h_on_cpu*.yaml")
    assert len(said) == 1 + sum(len(list((ROOT / "configs").glob(name))) for name in named)


def test_a_name_that_the_package_does_not_have_is_a_sentence():
    for name, hint in (("m3i:dmeo", "did you mean m3i:demo?"), ("m3i:../setup", "there are data/")):
        with pytest.raises(ConfigError, match=re.escape(f"no configuration {name!r}; {hint}")):
            load_config(name)
    assert load_config("m3i:demo") == load_config(ROOT / "configs" / "demo.yaml")
    assert load_config("m3i:demo.yaml").run == "demo"


def test_the_demonstration_is_the_four_commands(monkeypatch: pytest.MonkeyPatch, capsys):
    ran: list[list[str]] = []

    def execute(command: list[str], variables: dict[str, str]) -> int:
        ran.append(command[3:])
        return 7 if ran[-1][0] == failing else 0

    monkeypatch.setattr(demo, "execute", execute)
    failing = ""
    assert cli.main(["demo", "run=mine", "optimizer.duration=4 steps"]) == 0
    assert [words[0] for words in ran] == ["glyphs", "tokenizer", "--num_accelerators", "eval"]
    assert ran[2][-2:] == ["run=mine", "optimizer.duration=4 steps"]
    assert ran[3][:3] == ["eval", "--run", "runs/mine"]
    for words in (ran[0], ran[1], ran[3]):
        cli.parse(words)
    training = ran[2][ran[2].index("m3i_scale.train") + 1 :]
    assert train.parse(training).config == "m3i:demo"
    ran.clear()
    failing = "tokenizer"
    assert cli.main(["demo"]) == 7
    assert len(ran) == 2
    ran.clear()
    assert cli.main(["demo", "optimizer.duratoin=1 step"]) == 2
    assert "did you mean 'duration'" in capsys.readouterr().err
    assert not ran
