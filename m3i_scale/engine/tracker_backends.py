"""Each tracker in the terms of its library, which is imported when it is used.

All of a tracker's calls come from one thread (`trackers`); exceptions are its caller's.
"""

# ruff: noqa: D102  (`Backend` describes the methods)
from __future__ import annotations

import csv
import json
import math
import netrc
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Rows = Sequence[Mapping[str, Any]]


class Opening(NamedTuple):
    """What a tracker needs to know of a run."""

    folder: Path  # the run folder
    name: str  # of the run
    identity: str  # of its lineage; the same after every restart
    project: str  # `logging.project`
    settings: dict[str, Any]  # the whole configuration
    first: int | None  # step that training goes on from; None: nothing is made again


class Backend(Protocol):
    """One tracker's side; may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A PNG file."""

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Rows with the same columns: numbers, words, None."""

    def close(self) -> None:
        """Write everything that waits."""


class TensorBoard:
    """Events in RUN/tensorboard; what a crash left beyond the checkpoint is hidden."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(
            str(opening.folder / "tensorboard"), purge_step=opening.first
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def table(self, step: int, name: str, rows: Rows) -> None:
        columns = _columns(rows)
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
        self._board.add_text(name, "\n".join(lines), step)

    def close(self) -> None:
        self._board.close()


class Csv:
    """RUN/metrics.csv, a line a step, and RUN/NAME.csv for a table; pictures are files already.

    A column that comes later rewrites the file. Steps that are made again replace their lines.
    """

    def __init__(self, opening: Opening) -> None:
        self._folder, self._path = opening.folder, opening.folder / "metrics.csv"
        self._names: list[str] = []
        self._first = opening.first
        self._file: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "time": time.time(), **values}
        if self._file is None:
            self._rewrite([], before=math.inf if self._first is None else self._first)
        new = [name for name in row if name not in self._names]
        if new or self._file is None:
            self.close()
            self._rewrite(new)
            self._file = self._path.open("a", newline="")
        csv.DictWriter(self._file, self._names).writerow(row)
        self._file.flush()

    def _rewrite(self, new: list[str], before: float = math.inf) -> None:
        rows: list[dict[str, Any]] = []
        if self._path.is_file():
            with self._path.open(newline="", errors="replace") as file:
                reader = csv.DictReader(file)
                self._names = list(reader.fieldnames or [])
                rows = [row for row in reader if _is_whole(row) and int(row["step"]) < before]
        self._names += new
        unfinished = self._path.with_name("metrics.csv.new")
        with unfinished.open("w", newline="") as file:
            if self._names:
                writer = csv.DictWriter(file, self._names)
                writer.writeheader()
                writer.writerows(rows)
        os.replace(unfinished, self._path)

    def picture(self, step: int, name: str, path: Path) -> None:
        pass

    def table(self, step: int, name: str, rows: Rows) -> None:
        with (self._folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *_columns(rows)])
            writer.writeheader()
            writer.writerows({"step": step, **row} for row in rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _is_whole(row: Mapping[Any, Any]) -> bool:
    """Whether a line is none that a crash cut short."""
    return None not in row and None not in row.values() and str(row["step"]).isdecimal()


class Wandb:
    """A W&B run; offline in RUN/wandb where no key is known, for `wandb sync` later."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb: Any = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        self._run: Any = wandb.init(
            project=opening.project, id=opening.identity, name=opening.name,
            dir=str(opening.folder), config=opening.settings, resume="allow", mode=mode,
        )  # fmt: skip
        # W&B's own step must never go back, and steps are made again after a restart.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def table(self, step: int, name: str, rows: Rows) -> None:
        columns = _columns(rows)
        data = [[row.get(column) for column in columns] for row in rows]
        self._run.log({"step": step, name: self._wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urllib.parse.urlsplit(address).hostname or address
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackio:
    """A run of trackio, which keeps its projects on this machine (TRACKIO_DIR)."""

    def __init__(self, opening: Opening) -> None:
        import trackio

        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            project=opening.project, name=f"{opening.name}-{opening.identity}",
            config=opening.settings, resume="allow",
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        import pandas

        frame = pandas.DataFrame([dict(row) for row in rows])
        self._run.log({name: self._trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in RUN/mlflow.db."""

    TAG = "m3i.run"

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric: Any = Metric
        local = None if os.environ.get("MLFLOW_TRACKING_URI") else opening.folder.resolve()
        self._client: Any = MlflowClient(f"sqlite:///{local / 'mlflow.db'}" if local else None)
        found = self._client.get_experiment_by_name(opening.project)
        experiment = found.experiment_id if found else self._client.create_experiment(
            opening.project,
            artifact_location=(local / "mlflow-artifacts").as_uri() if local else None,
        )  # fmt: skip
        runs = self._client.search_runs(
            [experiment], filter_string=f"tags.`{self.TAG}` = '{opening.identity}'", max_results=1
        )
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {self.TAG: opening.identity}
            made = self._client.create_run(experiment, tags=tags, run_name=opening.name)
            self._id = made.info.run_id
        self._client.log_text(self._id, json.dumps(opening.settings, indent=1), "config.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def table(self, step: int, name: str, rows: Rows) -> None:
        columns = ["step", *_columns(rows)]
        data = {c: [{"step": step, **row}.get(c) for row in rows] for c in columns}
        self._client.log_table(self._id, data=data, artifact_file=f"{name}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _columns(rows: Rows) -> list[str]:
    """The names of all rows' entries, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


BACKENDS: dict[str, Callable[[Opening], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
    "csv": Csv,
}
