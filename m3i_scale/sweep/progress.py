"""The progress of a cell, read from its folder. Nothing here starts a process."""

from __future__ import annotations

import json
from typing import Any

from m3i_scale.config import Config, ConfigError, load_config
from m3i_scale.sweep.grid import Cell
from m3i_scale.sweep.spec import Evaluation

MARKER = "swept.json"  # written when a cell is trained and evaluated; holds how it was evaluated


def trained_steps(cell: Cell) -> int:
    """Steps in the newest complete checkpoint, 0 without one."""
    # Here, because it brings torch with it, and `m3i sweep --help` answers at once.
    from m3i_scale.engine.checkpoint import complete_checkpoints, step_of

    found = complete_checkpoints(cell.folder / "checkpoints")
    return max((step_of(path) for path in found), default=0)


def is_trained(cell: Cell) -> bool:
    """Whether training has reached its last step."""
    return trained_steps(cell) >= cell.steps


def is_finished(cell: Cell, evaluation: Evaluation) -> bool:
    """Whether the cell is trained, and evaluated in this way."""
    try:
        marker = json.loads((cell.folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return marker == _marker(cell, evaluation)


def mark_finished(cell: Cell, evaluation: Evaluation) -> None:
    """Remember that the cell needs nothing more."""
    (cell.folder / MARKER).write_text(json.dumps(_marker(cell, evaluation), indent=1) + "\n")


def _marker(cell: Cell, evaluation: Evaluation) -> dict[str, Any]:
    return {"steps": cell.steps, "evaluation": evaluation.model_dump(mode="json")}


def state(cell: Cell, evaluation: Evaluation) -> str:
    """In words, for lists."""
    if is_finished(cell, evaluation):
        return "finished"
    if is_trained(cell):
        return "trained, not evaluated"
    steps = trained_steps(cell)
    return f"interrupted after step {steps} of {cell.steps}" if steps else "not begun"


def require_unchanged(cell: Cell) -> None:
    """Refuse to resume a run that began with another configuration.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    begun = cell.folder / "config.yaml"
    if not begun.exists():
        return
    key = _first_difference(_settings(load_config(begun)), _settings(cell.config))
    if key is not None:
        raise ConfigError(
            f"cell {cell.name} was begun with another {key} than the sweep now says; remove "
            f"{cell.folder} to start it anew, or give the sweep another name"
        )


def _settings(config: Config) -> dict[str, Any]:
    """The settings that influence training: neither folders nor logging."""
    return config.model_dump(mode="json", exclude={"run", "folder", "checkpoint", "logging"})


def _first_difference(one: Any, other: Any, path: str = "") -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *(key for key in other if key not in one)):
            inside = f"{path}.{key}" if path else str(key)
            found = _first_difference(one.get(key), other.get(key), inside)
            if found is not None:
                return found
        return None
    return None if one == other else path
