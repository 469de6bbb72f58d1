"""What is written about a run: JSON lines, TensorBoard, a progress bar; and where it came from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from m3i_scale.cluster.launch import World
from m3i_scale.config import RunConfig, dump_config
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.lines import JsonLines
from m3i_scale.engine.trackers import Trackers
from m3i_scale.profiling.peaks import dense_bf16_peak

log = logging.getLogger(__name__)

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

    def reduce(
        self, world: World, own: Sequence[float | Tensor]
    ) -> tuple[dict[str, float], Tensor]:
        """Means over micro-steps and ranks, and what every rank says of itself.

        One collective and one wait for the device.

        Args:
            world: this rank.
            own: K numbers of this rank, on the host or scalars on the device.

        Returns:
            The means by name; the numbers of all ranks, float64 (ranks, K) in CPU memory.
        """
        names = sorted(self._pairs)
        pairs = torch.stack([self._pairs[name] for name in names]).double()  # (M, 2)
        each = pairs.new_zeros(world.size, len(own))
        each[world.rank] = torch.stack(
            [v.to(pairs) if isinstance(v, Tensor) else pairs.new_full((), v) for v in own]
        )
        table = torch.cat([pairs.flatten(), each.flatten()])  # a sum with zeros gathers
        if world.size > 1:
            dist.all_reduce(table)
        table = table.cpu()
        sums, counts = table[: pairs.numel()].view(-1, 2).T.tolist()
        means = {
            n: s / c if c else float("nan") for n, s, c in zip(names, sums, counts, strict=True)
        }
        return means, table[pairs.numel() :].view(world.size, len(own))


class MetricLog:
    """Rank 0's record of a run; does nothing on other ranks.

    Args:
        folder: the run folder.
        is_main: whether this is rank 0.
        total: steps of the whole run.
        first: step that training begins at.
        trackers: told of every step, too.
        attempt: its name in the lines (`events`).
        picture: name of a file that the first step draws into the folder, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        total: int,
        first: int,
        trackers: Trackers | None = None,
        attempt: str = "",
        picture: str | None = None,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._lines = JsonLines(folder / "metrics.jsonl")
        self._attempt = {"attempt": attempt} if attempt else {}
        interval = 1 if sys.stderr.isatty() else 30  # seconds; a log file shall stay readable
        self._bar = tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, mininterval=interval
        )
        self._trackers = trackers
        self._picture = folder / picture if picture else None
        self._opened = time.time()

    def write(self, step: int, values: dict[str, float], *, show: bool) -> None:
        """Record one step; `show` renews the figures beside the progress bar."""
        if not self._is_main:
            return
        if self._trackers is not None and self._trackers.switched_off:
            values = {**values, "trackers_switched_off": self._trackers.switched_off}
        self._lines.write({"step": step, "time": time.time(), **self._attempt, **values})
        with contextlib.suppress(OSError):  # the file that shows it may be on a full disk, too
            if show:
                self._bar.set_postfix_str(_summary(values), refresh=False)
            self._bar.update(step + 1 - self._bar.n)
        if self._trackers is not None:
            self._trackers.scalars(step, values)
            self._show_picture(self._trackers, step)

    def _show_picture(self, trackers: Trackers, step: int) -> None:
        """The picture that the first step of a run has drawn."""
        path, self._picture = self._picture, None
        with contextlib.suppress(OSError):  # not drawn
            if path is not None and path.stat().st_mtime >= self._opened - 1:
                trackers.picture(step, path.stem, path)

    def close(self) -> None:
        """Flush and close everything."""
        if not self._is_main:
            return
        self._bar.close()
        self._lines.close()
        if self._trackers is not None:
            self._trackers.close()


def _summary(values: dict[str, float]) -> str:
    losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    return ", ".join([*parts, f"{values['images_per_second']:.0f} img/s"])


class Speed(NamedTuple):
    """What throughput is measured by."""

    flops: Mapping[str, float]  # of a sample, without recomputation, by kind of step
    peak: float | None  # FLOP/s that one rank's device could make, where it is known

    def values(self, samples_per_second: float, ranks: int, kind: str = "") -> dict[str, float]:
        """TFLOP/s of a rank, and the share of the peak (model FLOPs utilisation)."""
        rate = samples_per_second * self.flops[kind] / ranks
        share = {"machine/mfu": rate / self.peak} if self.peak else {}
        return {"machine/tflops_per_rank": rate / 1e12} | share


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device could make at most in a precision, where it is known."""
    # The known peaks are of half-precision products; nothing else can be a share of them.
    if device.type == "cuda" and precision != "fp32":
        return dense_bf16_peak(torch.cuda.get_device_name(device))
    return None


def memory(device: torch.device) -> list[float]:
    """Peaks of this rank's memory so far, GiB, in the order of `MEMORY`."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return [peak / 2**30 for peak in peaks]
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]  # counted in KiB


# Of tensors and of the allocator on a GPU; of the process, libraries and all, on a CPU.
MEMORY = {"cuda": ("allocated", "reserved"), "cpu": ("resident",)}


def machine_values(own: Tensor, device: torch.device) -> dict[str, float]:
    """Figures of the ranks among each other.

    Args:
        own: float64 (ranks, 2 + memory kinds): of each rank the seconds of the step before its
            networks started, those of them spent waiting for data, and `memory`.
        device: this rank's, like all others'.
    """
    alone = own[:, 0]
    slowest, usual = int(alone.argmax()), float(alone.median())
    peaks = own[:, 2:].amax(0).tolist()
    return {
        "data_wait_seconds": float(own[:, 1].mean()),
        "machine/longest_data_wait_seconds": float(own[:, 1].max()),
        "machine/slowest_rank": slowest,
        "machine/slowest_rank_seconds": float(alone[slowest]),
        "machine/slowest_rank_ratio": float(alone[slowest]) / usual if usual else 1.0,
        **{
            f"machine/memory_{kind}_gib": peak
            for kind, peak in zip(MEMORY[device.type], peaks, strict=True)
        },
    }


def working_values(working: Tensor) -> dict[str, float]:
    """Which rank the others waited for inside the step, and what that cost.

    Args:
        working: float64 (ranks,): seconds that each rank's device worked between collectives
            (`communication`); 0: not known yet.
    """
    if len(working) < 2 or not bool(working.all()):
        return {}
    slowest, usual = int(working.argmax()), float(working.median())
    return {
        "machine/slowest_device_rank": slowest,
        "machine/slowest_device_seconds": float(working[slowest]),
        "machine/slowest_device_ratio": float(working[slowest]) / usual,
        "machine/slowest_device_cost_seconds": float(working[slowest]) - usual,
    }


def write_provenance(folder: Path, config: RunConfig, deepspeed_settings: dict[str, Any]) -> None:
    """Write beside a run: resolved configuration, DeepSpeed's, commit, versions, command line."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", dump_config(config))
    write_whole(folder / "deepspeed.json", json.dumps(deepspeed_settings, indent=1))
    origin = {
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    write_whole(folder / "origin.json", json.dumps(origin, indent=1))


def write_initial(folder: Path, record: dict[str, Any] | None) -> None:
    """Write beside a run the weights that it started from; None: it drew them."""
    if record is None:
        (folder / "init.json").unlink(missing_ok=True)
    else:
        write_whole(folder / "init.json", json.dumps(record, indent=1))


def git_commit() -> str | None:
    """Commit of the source tree, with "+" when it has uncommitted changes; None outside git.

    `$M3I_COMMIT` says it where the tree is a copy without its history.
    """
    if os.environ.get("M3I_COMMIT"):
        return os.environ["M3I_COMMIT"]
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
