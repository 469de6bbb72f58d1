"""Small sweeps on disk, and cells as training and evaluation would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers.small import SMALL
from m3i_scale.config import dump_config
from m3i_scale.sweep import progress
from m3i_scale.sweep.grid import Cell, cells
from m3i_scale.sweep.spec import Sweep, load_sweep

GRID: dict[str, Any] = {
    "name": "small",
    "config": "small.yaml",
    "samples": 44,
    "seeds": [0, 5],
    "axes": {
        "gamma": [
            {"name": 0.5, "set": ["objective.balance.gamma=0.5"], "paper": {"top-1": 83.2}},
            {"name": "one", "paper": {"top-1": 83.3, "AP": 50}},
        ]
    },
    "evaluation": {"queries": "heldout.parquet"},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep file beside the small configuration and what it names; its runs go there too."""
    index, queries = folder / "train.parquet", folder / "heldout.parquet"
    for path in (index, queries):
        path.touch()
    (folder / "small.yaml").write_text(SMALL.replace("index: none", f"index: {index}"))
    own = {"folder": str(folder / "runs"), "evaluation": {"queries": str(queries)}}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**GRID, **own, **changes}))
    return file


def make(folder: Path, **changes: Any) -> tuple[Sweep, list[Cell]]:
    file = write_sweep(folder, **changes)
    sweep = load_sweep(file)
    return sweep, cells(sweep, file)


def train(cell: Cell, steps: int) -> None:
    """What a training leaves that has come so far."""
    checkpoint = cell.folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    (cell.folder / "config.yaml").write_text(dump_config(cell.config))


def finish(
    cell: Cell,
    sweep: Sweep,
    accuracy: Mapping[str, float],
    *,
    untrained: float = 0.25,
    spreads: Sequence[Mapping[str, float]] = (),
) -> None:
    """What a finished cell leaves."""
    train(cell, cell.steps)
    rows = [
        {"task": task, "trained": value, "untrained": untrained, "chance": 0.125}
        for task, value in accuracy.items()
    ]
    (cell.folder / "eval.json").write_text(json.dumps({"step": cell.steps, "rows": rows}))
    lines = [json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(spreads)]
    (cell.folder / "metrics.jsonl").write_text("".join(lines))
    progress.mark_finished(cell, sweep.evaluation)
