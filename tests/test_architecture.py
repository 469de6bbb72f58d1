"""The order of the packages: which may import which, without cycles; and how they may be named."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import m3i_scale.config.data

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m3i_scale"

# From the bottom to the top: a package imports those named with it, and nothing else of ours.
LEAVES = {"paths", "arguments", "ranks"}  # everything above may import them
ALLOWED: dict[str, set[str]] = {
    "m3i_kernels": set(),
    "paths": set(),
    "arguments": {"paths"},
    "ranks": set(),
    "config": LEAVES,
    "demo": {"config"},  # starts the other commands as processes
    "transfer_demo": {"demo", "ranks"},
    "models": {"m3i_kernels"},
    "objective": {"config", "models", "m3i_kernels"},
    "data": {"config"} | LEAVES,
    "shards": {"config", "data", "models"} | LEAVES,  # of models: the tokenizer, of captions
    "cluster": {"config"},
    "profiling": {"config", "objective", "models", "m3i_kernels"},
    "engine": {"config", "objective", "models", "cluster", "profiling", "m3i_kernels"} | LEAVES,
    "planner": {
        "config",
        "objective",
        "models",
        "profiling",
        "cluster",
        "engine",
        "integrations",
        "tasks",
        "m3i_kernels",
    }
    | LEAVES,
    # What the engine trains.
    "tasks": {
        "config",
        "objective",
        "models",
        "data",
        "cluster",
        "engine",
        "profiling",
        "integrations",
        "transfer",  # what a pre-trained encoder has learned
        "m3i_kernels",
    }
    | LEAVES,
    # Reads what the engine has written; imports nothing of it that needs PyTorch.
    "report": {"config", "engine"} | LEAVES,
    "transfer": {"config", "objective", "models", "data", "cluster", "engine", "m3i_kernels"}
    | LEAVES,
    # Other people's libraries and weights, for the networks of `models`.
    "integrations": {"config", "models", "m3i_kernels"} | LEAVES,
    # Starts training and evaluation as processes; of the engine it asks which checkpoints are
    # complete and what an exit code means.
    "sweep": {"config", "profiling", "engine", "integrations"} | LEAVES,
}
ENTRY_POINTS = {"train", "cli"}  # import everything, and nobody imports them
ALLOWED |= {entry: set(ALLOWED) for entry in ENTRY_POINTS}
# A package's `commands.py` joins what the package's other modules do not know.
JOINED_BY_COMMANDS = {"transfer": {"cluster", "engine"}, "planner": {"tasks"}}
# Only these know DeepSpeed.
DEEPSPEED = {"engine", "cluster"}


def modules() -> Iterator[tuple[str, Path]]:
    """(package, file) of every module of the project."""
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


def package_of(name: str) -> str | None:
    """The package that a full module name lies in; None outside the project."""
    parts = name.split(".")
    if parts[0] == "m3i_kernels":
        return "m3i_kernels"
    ours = parts[0] == "m3i_scale" and len(parts) > 1 and not parts[1].startswith("__")
    return parts[1] if ours else None


@pytest.mark.parametrize(
    ("package", "path"), list(modules()), ids=lambda v: str(v).replace(str(ROOT), "")
)
def test_imports_go_one_way(package: str, path: Path):
    for name, line in imported(path):
        target = package_of(name)
        allowed = target in {None, package} | ALLOWED[package]
        assert allowed, f"{path}:{line}: {package} imports {name}"


def test_only_the_commands_join():
    for package, path in modules():
        joined = JOINED_BY_COMMANDS.get(package, set()) if path.stem != "commands" else set()
        for name, line in imported(path):
            assert package_of(name) not in joined, f"{path}:{line}: {package} imports {name}"


def test_the_command_line_only_dispatches():
    ours = {package_of(name) for name, _ in imported(PACKAGE / "cli.py")}
    assert ours <= {None} | LEAVES
    assert len((PACKAGE / "cli.py").read_text().splitlines()) < 220


def test_every_package_has_its_place():
    assert {package for package, _ in modules()} == set(ALLOWED)


def test_the_order_of_packages_has_no_cycle():
    list(TopologicalSorter(ALLOWED).static_order())  # raises CycleError


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_modules_have_no_cycle():
    # Imports inside functions and under TYPE_CHECKING count, too.
    paths = {module_name(path): path for _, path in modules()}
    graph = {}
    for name, path in paths.items():
        found = {full if full in paths else full.rpartition(".")[0] for full, _ in imported(path)}
        graph[name] = (found & set(paths)) - {name}
    list(TopologicalSorter(graph).static_order())


def test_only_engine_and_cluster_know_deepspeed():
    for package, path in modules():
        for name, line in imported(path):
            if name.split(".")[0] == "deepspeed":
                assert package in DEEPSPEED, f"{path}:{line} imports deepspeed"


def test_nobody_imports_the_entry_points():
    for _, path in modules():
        for name, line in imported(path):
            entry = name.startswith("m3i_scale.") and name.split(".")[1] in ENTRY_POINTS
            assert not entry, f"{path}:{line} imports {name}"


def test_no_module_shadows_another_package():
    # The launcher puts m3i_scale/ itself first on sys.path.
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    installed = set(importlib.metadata.packages_distributions()) | {"kernels"}
    assert not names & (set(sys.stdlib_module_names) | installed)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_settings_of_data_are_declared_once():
    """data/, shards/ and transfer/ take the sections of the configuration; they have no others."""
    sections = {name for name, found in vars(m3i_scale.config.data).items() if _is_section(found)}
    assert sections == {"Source", "Photometric", "Augmentation", "Storage", "MixedSize", "Data"}
    for package, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and package != "config":
                assert node.name not in sections, f"{path}:{node.lineno} declares {node.name} again"
    assert all(getattr(m3i_scale.config, n) is vars(m3i_scale.config.data)[n] for n in sections)


def _is_section(found: object) -> bool:
    return (
        isinstance(found, type)
        and issubclass(found, m3i_scale.config.Node)
        and found is not m3i_scale.config.Node
    )


def test_the_entry_point_is_thin():
    text = (PACKAGE / "train.py").read_text()
    assert len(text.splitlines()) < 200
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(text)))


def test_files_stay_readable():
    long = {p for _, p in modules() if len(p.read_text().splitlines()) > 450}
    assert not long, f"split {long}"


def test_tests_share_helpers_and_import_no_other_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for name, line in imported(path):
            first = name.split(".")[0]
            assert not first.startswith(("test_", "conftest")), f"{path}:{line} imports {name}"


def test_no_protocol_is_checked_while_the_program_runs():
    # From Python 3.12 on `isinstance` with one does not see submodules of networks: a teacher is
    # then no teacher, and nobody is told.
    assert not [path for path in PACKAGE.rglob("*.py") if "runtime_checkable" in path.read_text()]
