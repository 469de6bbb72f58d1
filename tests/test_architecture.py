"""The walls of the house: which room may import which, and how modules may be called."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m3i_scale"

# Room -> what of the project it may import. `config` is a leaf whose plain data every room but
# models and data may read.
BELOW_ENGINE = {"objective", "models", "m3i_kernels", "config", "config_file"}
ALLOWED = {
    "config_node": set(),
    "config_objective": {"config_node"},
    "config": {"config_node", "config_objective"},
    "config_file": {"config"},
    "data": {"data"},
    "models": {"models", "m3i_kernels"},
    "objective": {"objective", "models", "m3i_kernels", "config"},
    "engine": {"engine"} | BELOW_ENGINE,
    "transfer": {"transfer", "data"} | BELOW_ENGINE,
    "train": {"engine", "data"} | BELOW_ENGINE,
    "cli": {"engine", "transfer", "data"} | BELOW_ENGINE,
    # Starts training and evaluation as processes; of the engine it asks how
    # many FLOPs, which checkpoints are complete and what an exit code means.
    "sweep": {"sweep", "config", "config_file", "engine"},
    "m3i_kernels": {"m3i_kernels"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module of the project."""
    for path in PACKAGE.rglob("*.py"):
        first = path.relative_to(PACKAGE).parts[0]
        if first != "__init__.py":
            yield first.removesuffix(".py"), path
    for path in (ROOT / "kernels" / "m3i_kernels").rglob("*.py"):
        yield "m3i_kernels", path


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of imported modules (and of what is taken from them), with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(name: str) -> str | None:
    """The room a full module name lies in; None outside the project."""
    parts = name.split(".")
    if parts[0] == "m3i_kernels":
        return "m3i_kernels"
    return parts[1] if parts[0] == "m3i_scale" and len(parts) > 1 else None


@pytest.mark.parametrize(
    ("room", "path"), list(modules()), ids=lambda v: str(v).replace(str(ROOT), "")
)
def test_imports_go_one_way(room: str, path: Path):
    for name, line in imported(path):
        target = room_of(name)
        assert target is None or target in ALLOWED[room], f"{path}:{line}: {room} imports {name}"


def test_every_room_is_known():
    assert {room for room, _ in modules()} == set(ALLOWED)


def test_only_the_engine_knows_deepspeed():
    for room, path in modules():
        for name, line in imported(path):
            if name.split(".")[0] == "deepspeed":
                assert room == "engine", f"{path}:{line} imports deepspeed"


def test_nobody_imports_the_entry_point():
    for _, path in modules():
        assert not any(name.startswith("m3i_scale.train") for name, _ in imported(path)), path


def test_no_module_shadows_another_package():
    # The launcher puts m3i_scale/ itself first on sys.path.
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    installed = set(importlib.metadata.packages_distributions()) | {"kernels"}
    assert not names & (set(sys.stdlib_module_names) | installed)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_entry_point_is_thin():
    text = (PACKAGE / "train.py").read_text()
    assert len(text.splitlines()) < 170
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(text)))


def test_files_stay_readable():
    long = {p for _, p in modules() if len(p.read_text().splitlines()) > 450}
    assert not long, f"split {long}"
