"""What is written about a run: JSON lines, TensorBoard, a progress bar; and where it came from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from m3i_scale.config import Config
from m3i_scale.config_file import dump_config

PACKAGES = (
    "torch",
    "deepspeed",
    "triton",
    "transformers",
    "timm",
    "webdataset",
    "numpy",
    "pyarrow",
)


class Figures:
    """Sums (sum, count) pairs over micro-steps and ranks; the same names on every rank."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, pairs: dict[str, Tensor]) -> None:
        """Add one micro-step's pairs."""
        for name, pair in pairs.items():
            self._pairs[name] = self._pairs[name] + pair if name in self._pairs else pair

    def add_value(self, name: str, value: float, device: torch.device) -> None:
        """Add one number of this rank."""
        self.add({name: torch.tensor([value, 1.0], device=device)})

    def means(self) -> dict[str, float]:
        """Means over micro-steps and ranks (a collective when there are several ranks)."""
        names = sorted(self._pairs)
        table = torch.stack([self._pairs[name] for name in names]).double()  # (M, 2)
        if dist.is_initialized():
            dist.all_reduce(table)
        sums, counts = table.T.tolist()
        return {
            n: s / c if c else float("nan") for n, s, c in zip(names, sums, counts, strict=True)
        }


class MetricLog:
    """Rank 0's record of a run; does nothing on other ranks."""

    def __init__(
        self, folder: Path, *, leads: bool, total: int, first: int, tensorboard: bool
    ) -> None:
        self._leads = leads
        if not leads:
            return
        self._lines = (folder / "metrics.jsonl").open("a")
        self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, mininterval=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def write(self, step: int, values: dict[str, float], *, show: bool) -> None:
        """Record one step; `show` refreshes the progress bar's figures."""
        if not self._leads:
            return
        self._lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._lines.flush()
        self._bar.update(step + 1 - self._bar.n)
        if show:
            self._bar.set_postfix_str(_summary(values))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close everything."""
        if not self._leads:
            return
        self._bar.close()
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _summary(values: dict[str, float]) -> str:
    losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    return ", ".join([*parts, f"{values['images_per_second']:.0f} img/s"])


def write_provenance(folder: Path, config: Config, deepspeed_settings: dict[str, Any]) -> None:
    """Write beside a run: resolved configuration, DeepSpeed's, commit, versions, command line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed_settings, indent=1))
    origin = {
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=1))


def git_commit() -> str | None:
    """Commit of the source tree, with "+" when it has uncommitted changes; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
