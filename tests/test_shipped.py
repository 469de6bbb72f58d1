"""Every YAML file of configs/ and experiments/ is found and read by a run, a sweep or a method."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from m3i_scale.config import dump_config, load_config, load_run
from m3i_scale.config.yaml_text import parse
from m3i_scale.sweep.grid import cells
from m3i_scale.sweep.spec import load_sweep

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EVERY = sorted(
    path for name in ("configs", "experiments") for path in (ROOT / name).rglob("*.y*ml")
)


def keys(path: Path) -> set[str]:
    """The top-level keys of a file, those of its bases included."""
    tree = parse(path.read_bytes()).value
    bases = tree.get("base", [])
    below = [keys(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)]
    return set(tree).union(*below)


RUNS = [path for path in EVERY if "run" in keys(path)]
SWEEPS = [path for path in EVERY if "name" in keys(path)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_is_valid_and_survives_a_round_trip(path: Path, tmp_path: Path):
    config = load_run(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_run(again) == config


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_a_sweep_is_valid_in_every_cell(path: Path):
    sweep = load_sweep(path)
    grid = cells(sweep, path)
    assert sweep.name == path.stem
    assert len({cell.steps for cell in grid}) == 1
    assert {cell.config.run_folder.parent.name for cell in grid} == {path.stem}


def test_every_other_file_is_part_of_a_run_or_of_a_sweep_or_can_be_laid_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: set[Path] = set()
    open_file = Path.open

    def remember(path: Path, *how: Any, **more: Any) -> IO[Any]:
        seen.add(path.resolve())
        return open_file(path, *how, **more)

    monkeypatch.setattr(Path, "open", remember)
    for path in RUNS:
        load_run(path)
    for path in SWEEPS:
        cells(load_sweep(path, ["seeds=[0]"]), path)
    assert len(seen) > len(RUNS) + len(SWEEPS)
    over = tmp_path / "over.yaml"
    for path in EVERY:
        if path not in seen:
            over.write_text(yaml.safe_dump({"base": [str(CONFIGS / "demo.yaml"), str(path)]}))
            load_config(over)
