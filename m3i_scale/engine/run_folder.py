"""What rank 0 does to a run folder before training writes to it.

    runs/NAME/checkpoints/          one lineage only: the run's
    runs/NAME/set-aside/TIME/       a run folder of its own, with what another lineage left

When a run begins anew in a used folder, or goes back to an older checkpoint, the checkpoints that
it leaves behind are moved away and never removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

from m3i_scale.engine import checkpoint, lineage
from m3i_scale.engine.lineage import Lineage

log = logging.getLogger(__name__)

PROVENANCE = ("config.yaml", "deepspeed.json", "origin.json", "init.json")


def new_lineage(folder: Path, origin: Path | None, step: int) -> Lineage:
    """The lineage of a start of training from the checkpoint `origin`, or from nothing.

    Args:
        folder: the run folder.
        origin: a complete checkpoint, of this run or of another one.
        step: where training begins.
    """
    if origin is None:
        return lineage.begin_anew()
    inside = origin.resolve().parent == (folder / "checkpoints").resolve()
    known = lineage.of_checkpoint(origin)
    if inside and known is not None:
        return known.branch(step, origin)
    return lineage.begin_anew(step, origin)


def begin(folder: Path, origin: Path | None, step: int) -> Lineage:
    """Write the lineage of this start, and set aside what is of another one.

    An interruption at any moment leaves a folder that the next start reads in the same way, since
    `lineage.json` comes first.

    Raises:
        OSError: the folder cannot be written.
    """
    line = new_lineage(folder, origin, step)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    lineage.write_file(folder / "checkpoints" / lineage.FILE, line)
    set_aside(folder, line, step)
    return line


def set_aside(folder: Path, line: Lineage, step: int) -> None:
    """Move checkpoints of other lineages to a run folder of their own, with their curve."""
    found = checkpoint.all_complete(folder / "checkpoints")
    others = [
        path
        for path in found
        if not checkpoint.belongs(path, line)
        or (lineage.of_checkpoint(path) is None and checkpoint.step_of(path) > step)
    ]
    if not others:
        return
    aside = _new_folder(folder / "set-aside")
    told = sorted(path.name for path in folder.glob("events*.jsonl"))
    for name in (*PROVENANCE, "metrics.jsonl", *told):
        if (folder / name).is_file():
            shutil.copy2(folder / name, aside / name)
    for path in others:
        os.rename(path, aside / "checkpoints" / path.name)
    if (folder / "metrics.jsonl").is_file():
        _keep_steps_before(folder / "metrics.jsonl", step)
    steps = ", ".join(str(checkpoint.step_of(path)) for path in others)
    log.warning(
        "training starts at step %d and leaves the checkpoints of steps %s behind; they are set "
        "aside in %s, which can be removed when it is no longer needed",
        step,
        steps,
        aside,
    )


def _new_folder(parent: Path) -> Path:
    """A run folder named after the time."""
    stem = time.strftime("%Y-%m-%dT%H-%M-%S")
    for number in range(1, 1000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            (folder / "checkpoints").mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}/{stem}-1000")


def _keep_steps_before(path: Path, step: int) -> None:
    """Drop the lines of steps from `step` on, which are the other lineage's; all or nothing."""
    new = path.with_name(path.name + ".new")
    with path.open("rb") as lines, new.open("wb") as kept:
        kept.writelines(line for line in lines if _is_before(line, step))
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(new, path)


def _is_before(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] < step)
    except (ValueError, KeyError, TypeError):  # torn by a crash
        return False
