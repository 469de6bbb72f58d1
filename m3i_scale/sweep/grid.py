"""The cells of a sweep: every combination of variants and seeds, each with a configuration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from m3i_scale.config import Config, ConfigError
from m3i_scale.config.load import load_config, override
from m3i_scale.config.shipped import locate
from m3i_scale.paths import expand, literal
from m3i_scale.sweep.spec import Sweep, Variant


class Cell(NamedTuple):
    """One run of a sweep."""

    number: int
    variants: dict[str, Variant]  # by axis
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of the run, unique in the sweep: `intern_image-m3i-seed0`."""
        return self.config.run

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.config.run_folder

    @property
    def steps(self) -> int:
        """Optimiser steps in which all samples are seen."""
        # The length is stated in samples, so the size of an epoch does not matter.
        return self.config.optimizer.duration.steps(
            batch=self.config.optimizer.global_batch_size, epoch_samples=1
        )


def cells(sweep: Sweep, file: str | Path) -> list[Cell]:
    """All cells in the order in which they run: seed by seed, so that early tables are whole.

    Args:
        sweep: the grid.
        file: where it was read from; its configuration files are relative to that.

    Raises:
        ConfigError: a cell's configuration is impossible; the cell is named.
    """
    rows = [
        dict(zip(sweep.axes, row, strict=True)) for row in itertools.product(*sweep.axes.values())
    ]
    home = Path(expand(str(file))).parent
    every = [
        Cell(number, row, seed, _config(sweep, home, row, seed))
        for number, (seed, row) in enumerate(itertools.product(sweep.seeds, rows))
    ]
    folders: dict[str, Cell] = {}
    for cell in every:
        if cell.name in folders:
            raise ConfigError(
                f"cells {cell.number} and {folders[cell.name].number} are both called {cell.name}; "
                "rename a variant"
            )
        folders[cell.name] = cell
    return every


def _config(sweep: Sweep, home: Path, row: dict[str, Variant], seed: int) -> Config:
    name = "-".join([*(variant.name for variant in row.values()), f"seed{seed}"])
    layers = [*sweep.config, *(file for variant in row.values() for file in variant.config)]
    first, *others = [locate(file, home) for file in layers]
    decided = [
        override("run", name),
        override("folder", literal(str(sweep.own_folder))),
        override("seed", seed),
        override("optimizer.duration", f"{sweep.samples} samples"),
    ]
    changes = [*sweep.set, *(change for variant in row.values() for change in variant.set)]
    try:
        return load_config(first, [*changes, *decided], over=others)
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None
