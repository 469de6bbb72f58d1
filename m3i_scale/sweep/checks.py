"""Checks before the first run: mistakes that would end every run, or its evaluation hours later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from m3i_scale.config import ConfigError
from m3i_scale.engine.schedules import make_schedule
from m3i_scale.sweep.grid import Cell
from m3i_scale.sweep.spec import Sweep


def require_possible(sweep: Sweep, grid: Sequence[Cell]) -> None:
    """Check the schedules of all cells, and that every file on this machine that they name exists.

    Raises:
        ConfigError: with one sentence, for the first that is wrong.
    """
    for cell in grid:
        try:
            # The length is in samples, and a warm-up in epochs is left to the run, which reads
            # the indexes.
            make_schedule(cell.config.optimizer, epoch_samples=1)
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
    for where, path in dict.fromkeys(_named(sweep, grid)):
        if "://" not in path and not Path(path).is_file():
            raise ConfigError(
                f"{where}: there is no file {path}; make it (for the demo's data and "
                "for your own, experiments/m3i_small/README.md says how) or change the path"
            )


def _named(sweep: Sweep, grid: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    for cell in grid:
        for source in cell.config.data.sources:
            yield f"data source {source.name}", source.index
        text = cell.config.model.text
        if text is not None and text.tokenizer.endswith(".json"):  # else a name on the Hub
            yield "model.text.tokenizer", text.tokenizer
    for path in sweep.evaluation.gallery:
        yield "evaluation.gallery", path
    for path in sweep.evaluation.queries:
        yield "evaluation.queries", path
