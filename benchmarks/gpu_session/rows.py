"""Rows of a session: JSON lines in one file, each with where, on what and by which code it arose.

The session's folder is `$M3I_SESSION`; `run.sh` sets it, and `M3I_REHEARSE=1` where the parts are
to run in their small form on a CPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("M3I_SESSION", "."))
REHEARSE = os.environ.get("M3I_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSE else "cuda"
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "timm", "numpy")


@functools.cache
def origin() -> dict[str, str]:
    """Device, driver, versions and commit: the same in all rows of a process."""
    import torch  # the report reads rows without it

    return {
        "device": "cpu" if REHEARSE else torch.cuda.get_device_name(),
        "driver": "none" if REHEARSE else driver(),
        **{name: version(name) for name in PACKAGES[:3]},
        "commit": commit(),
    }


def end_of(seconds: str, margin: float) -> float:
    """When on the monotonic clock work must end so that rows can be written within the limit.

    What they need of PyTorch is looked up now: its import takes longer than a margin has.
    """
    begun = time.monotonic()
    origin()
    return begun + float(seconds) - margin


def write(part: str, name: str, /, **values: Any) -> None:
    """Append one row and print it; a part that is stopped later has lost nothing.

    Values of another program may bring any key: `part`, `name` and the origin's are this row's.
    """
    row = {"part": part, "name": name, **(values | origin() | {"part": part, "name": name})}
    with (FOLDER / "rows.jsonl").open("a") as file:
        file.write(without_folders(json.dumps(row)) + "\n")
    shown = {k: v for k, v in row.items() if k not in origin()}
    print(json.dumps(shown)[:600], flush=True)


def without_folders(text: str) -> str:
    """Leave out where this machine keeps the project, the session and its packages."""
    for folder in (ROOT, FOLDER.resolve(), sys.prefix):
        text = text.replace(f"{folder}/", "")
    return text


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; one that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def all_hold(part: str) -> bool:
    """Whether no row of this session's part says that something does not hold."""
    return all(row["ok"] for row in read(FOLDER / "rows.jsonl") if row["part"] == part)


def driver() -> str:
    """Version of the NVIDIA driver."""
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def version(package: str) -> str:
    """Installed version of a package, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """Commit of the source tree; `$M3I_COMMIT` where the tree is a copy without its history."""
    if "M3I_COMMIT" in os.environ:
        return os.environ["M3I_COMMIT"]
    changed = "+" if output("git", "status", "--porcelain", "-uno") else ""
    return (output("git", "rev-parse", "--short=12", "HEAD") or "unknown") + changed


def output(*command: str) -> str:
    """What a command prints, or nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def milliseconds(function: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one call; on a GPU by events around each of the calls."""
    for _ in range(warmup):
        function()
    if DEVICE == "cpu":
        return sorted(_wall(function) for _ in range(3))[1]
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def _wall(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)
