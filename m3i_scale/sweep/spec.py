"""A sweep file: the variants to compare, their compute, and their evaluation.

    name: gamma
    config: base.yaml                 # one file or several, each laid over the ones before it
    samples: 50000                    # that every run sees
    seeds: [0, 1, 2]
    axes:                             # the grid is the product of the axes and the seeds
      gamma:
        - {name: "0.5", set: [objective.balance.gamma=0.5], paper: {ImageNet top-1: 83.2}}
        - {name: "1", set: [objective.balance.gamma=1], paper: {ImageNet top-1: 83.3}}
    evaluation: {queries: [data/heldout.parquet]}

A file may start from others with `base:`, as configurations do. Configuration files are named
relative to the sweep file, data (as in configurations) relative to the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from m3i_scale.config import Count, Node, PathText
from m3i_scale.config.load import load

# What a sweep decides itself, so that runs have folders of their own and equal compute.
RESERVED = ("run", "folder", "seed", "optimizer.duration")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_word(value: object) -> object:
    """YAML reads `name: 0.5` as a number; the name is the number as Python writes it."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Files = Annotated[list[PathText], BeforeValidator(_as_list)]
Word = Annotated[str, BeforeValidator(_as_word)]


class Variant(Node):
    """One place on an axis: files laid over the configuration, then `a.b=value` changes.

    `paper` holds published figures for it, by the title of their column in the table.
    """

    name: Word
    """Name of the row."""
    config: Files = Field(default=[])
    """Files laid over the configuration."""
    set: list[str] = Field(default=[])
    """`a.b=value` changes."""
    paper: dict[str, float] = Field(default={})
    """Published figures."""


class Evaluation(Node):
    """The arguments of `m3i eval`."""

    queries: Annotated[Files, Field(min_length=1)]
    """Indexes of held-out images."""
    gallery: Files = Field(default=[])
    """Indexes of known images; empty: those that the run learned from."""
    which: Literal["student", "teacher"] = "student"
    """Student or teacher."""
    probe: bool = True
    """Fit linear probes, too."""
    neighbours: Count = 20
    """Of kNN."""
    limit: Count | None = None
    """First images of each index; null: all."""
    batch: Count = 64
    """Images at once."""
    subject: str = "caption subject"
    """What captions name, in the table."""
    category: str = "category"
    """What categories are, in the table."""


class Report(Node):
    """What the table shows; nothing here has an influence on the runs."""

    tasks: list[str] = Field(default=[])
    """Rows of the evaluation that the table shows, in this order; empty: all."""


class Sweep(Node):
    """A grid of configurations and seeds."""

    name: str
    """Name of the sweep: its folder below `folder`."""
    title: str = ""
    """Heading of the table."""
    folder: PathText = "runs/sweeps"
    """Folder of all sweeps."""
    config: Annotated[Files, Field(min_length=1)]
    """Configuration files, each laid over the ones before it; relative to the sweep file, or
    `m3i:NAME`."""
    set: list[str] = Field(default=[])
    """`a.b=value` changes of every run."""
    samples: Count
    """Samples that every run sees."""
    seeds: list[int] = Field(min_length=1)
    """One run of each variant for each seed."""
    ranks: Count = 1
    """Processes of a run."""
    axes: dict[str, list[Variant]] = Field(min_length=1)
    """Named variants; the grid is their product."""
    evaluation: Evaluation
    """How runs are evaluated."""
    report: Report = Report()
    """What the table shows."""

    @property
    def own_folder(self) -> Path:
        """Where everything about this sweep is written: a folder for each run, logs, tables."""
        return Path(self.folder) / self.name

    @model_validator(mode="after")
    def _possible(self) -> Sweep:
        problem = next(self._impossible(), None)
        if problem:
            raise ValueError(problem)
        return self

    def _impossible(self) -> Iterator[str]:
        for word in (self.name, *(v.name for axis in self.axes.values() for v in axis)):
            if not re.fullmatch(r"[\w.+-]+", word) or word.startswith("."):
                yield (
                    f"{word!r} becomes part of a file name; use letters, digits, '_', '-', '+' "
                    "and '.' only, and a letter, '_' or digit first"
                )
        for axis, variants in self.axes.items():
            if not variants:
                yield f"axis {axis!r} has no variant; name one or drop the axis"
            repeated = _repeated([variant.name for variant in variants])
            if repeated:
                yield f"axis {axis!r} has two variants named {repeated!r}; rename one"
        if _repeated(self.seeds) is not None:
            yield f"seeds: {_repeated(self.seeds)} is there twice; a seed counts once"
        changes = [self.set, *(v.set for axis in self.axes.values() for v in axis)]
        for change in (change for several in changes for change in several):
            key = change.partition("=")[0].strip()
            if key in RESERVED:
                yield (
                    f"{change!r}: {key} is set by the sweep, the same for all its runs; use its "
                    "keys name, folder, seeds and samples"
                )


def _repeated(values: Sequence[object]) -> object | None:
    return next((v for n, v in enumerate(values) if v in values[:n]), None)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, apply `a.b=value` overrides to it, validate.

    Raises:
        ConfigError: with one sentence, for anything wrong.
    """
    return load(Sweep, path, overrides)
