"""Part 4: tasks of the backbone on the device, each through the command that users type.

    python transfer.py SECONDS     ends by itself before that many have passed

A classifier, detectors and segmenters of the transfer demo train on characters pasted on
photographs: two steps in fp32 on the CPU, the next two there and on the device from the same
checkpoint; then from nothing on the device in bfloat16, to an evaluation. One row per head.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import memorise
import rows

from m3i_scale.ranks import torchrun
from m3i_scale.shards.pasted import SPLITS, Pasted, Recipe, build

FOLDER = rows.FOLDER / "transfer"
MARGIN = 4  # seconds for the rows
STEPS = 3 if rows.REHEARSE else 60  # in bfloat16
FIRST = 2  # steps before the checkpoint that both devices go on from
AGREE = 1e-3  # relative: losses of the same step on two devices in fp32
SAMPLED = 0.5  # the same, where the loss is of regions or points that are drawn on the device
ONCE = "engine.verify.every=null"  # no step is computed twice
LEARNS = 0.9  # the last losses against the first ones, in bfloat16
RECIPE = Recipe(image_size=64, objects=1, sizes=(0.5, 0.9), train=192, val=32)


class Head(NamedTuple):
    """A configuration of the transfer demo, changes to it, and how near its losses are."""

    config: str
    figure: str
    near: float
    changes: tuple[str, ...] = ()


def headed(name: str) -> str:
    """The change that gives a configuration a head that learns eight images by heart."""
    return f"model.head={json.dumps(memorise.HEADS[name])}"


HEADS = {
    "classification": Head("classification", "top1", AGREE),
    "Mask R-CNN": Head("detection", "box_AP", SAMPLED, ("model.head.masks=true",)),
    "DINO": Head("detection", "box_AP", SAMPLED, (headed("dino"),)),
    "UperNet": Head("segmentation", "mIoU", AGREE),
    "Mask2Former": Head("segmentation", "mIoU", SAMPLED, (headed("mask2former"),)),
}


def data(config: str) -> list[str]:
    """Where a configuration finds the pasted set."""
    pasted = Pasted(FOLDER / "pasted")
    changes = []
    for split in SPLITS:
        key = f"data.{'test' if split == 'val' and config != 'detection' else split}"
        if config == "classification":
            changes += [f"{key}.folder={pasted.crops(split)}"]
            continue
        changes += [f"{key}.images={pasted.images(split)}"]
        if config == "detection":
            changes += [f"{key}.annotations={pasted.annotations(split)}"]
        else:
            changes += [f"{key}.masks={pasted.masks(split)}"]
    return changes


def train(head: Head, folder: Path, steps: int, end: float, *changes: str, **more: str) -> None:
    """One run, to its end.

    Raises:
        RuntimeError: it failed or was stopped; with the last line it has written.
    """
    log = folder.with_suffix(".log")
    command = [*torchrun(1), "-m", "m3i_scale.train"]
    command += ["--config", f"configs/transfer/demo/{head.config}.yaml", *head.changes]
    command += [*data(head.config), f"folder={folder.parent}", f"run={folder.name}"]
    command += [f"optimizer.duration={steps} steps", "optimizer.warmup=1 steps"]
    command += [
        f"checkpoint={{every: {FIRST} steps, keep_last: 2}}",
        f"evaluation.every={steps} steps",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | more
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [*command, *changes],
                cwd=rows.ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(1, end - time.monotonic()),
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    if code:
        lines = [
            line for line in log.read_text().splitlines() if "Error: " in line or "error: " in line
        ]
        said = lines[0] if lines else "nothing"
        raise RuntimeError(f"{folder.name}: exit code {code}; it said {said[:300]}")


def folder_of(name: str, run: str) -> Path:
    """Where a head's run keeps everything."""
    return FOLDER / f"{name.replace(' ', '_')}_{run}"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of each step."""
    return rows.read(folder / "metrics.jsonl")


def compared(name: str, head: Head, end: float) -> None:
    """fp32: the steps after the checkpoint on the CPU and on the device."""
    until = 2 * FIRST
    cpu, device = folder_of(name, "cpu"), folder_of(name, "device")
    train(head, cpu, until, end, "engine.device=cpu", "engine.precision=fp32", ONCE)
    shutil.copytree(cpu, device)
    shutil.rmtree(device / "checkpoints" / f"step-{until:08d}")
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}
    changes = [f"engine.device={rows.DEVICE}", "engine.precision=fp32", ONCE]
    train(head, device, until, end, *changes, **exact)
    losses = [
        {row["step"]: row["loss/total"] for row in metrics(folder) if row["step"] >= FIRST}
        for folder in (cpu, device)
    ]
    apart = max(abs(losses[1][step] - losses[0][step]) / losses[0][step] for step in losses[0])
    rows.write(
        "transfer",
        f"{name}: fp32 losses, device against CPU",
        ok=apart <= head.near,
        figure=apart,
        bound=head.near,
        losses=losses,
    )


def learned(name: str, head: Head, end: float) -> None:
    """bfloat16 on the device: the loss falls and the evaluation comes."""
    folder = folder_of(name, "bf16")
    changes = [f"engine.device={rows.DEVICE}", "engine.precision=bf16", "data.workers=2"]
    train(head, folder, STEPS, end, *changes)
    found = metrics(folder)
    losses = [row["loss/total"] for row in found]
    few = max(1, STEPS // 10)
    ratio = statistics.mean(losses[-few:]) / statistics.mean(losses[:few])
    last = found[-1]
    figure = last.get(f"evaluation/{head.figure}")
    falls = all(map(math.isfinite, losses)) and (ratio <= LEARNS or rows.REHEARSE)
    rows.write(
        "transfer",
        f"{name}: {STEPS} steps in bfloat16, last losses against the first",
        ok=falls and figure is not None,
        figure=ratio,
        bound=LEARNS,
        evaluation={head.figure: figure},
        evaluation_seconds=last.get("evaluation_seconds"),
        step_seconds=statistics.median(row["step_seconds"] for row in found),
        computed_twice=last.get("verify/steps_computed_twice"),
        memory_gib=last.get("machine/memory_allocated_gib"),
    )


def check(name: str, end: float) -> None:
    """Both rows of a head; a row with the reason where one cannot be made."""
    for one in (compared, learned):
        try:
            one(name, HEADS[name], end)
        except Exception as error:
            rows.write("transfer", f"{name}: {one.__name__}", ok=False, figure=None, bound=None,
                       error=f"{type(error).__name__}: {error}"[:500])  # fmt: skip


def main(arguments: list[str]) -> int:
    """Make the set, train all heads side by side; 1 where something did not come about."""
    end = rows.end_of(arguments[0], MARGIN)
    FOLDER.mkdir(parents=True, exist_ok=True)
    build(FOLDER / "pasted", RECIPE)
    with ThreadPoolExecutor(2 if rows.REHEARSE else len(HEADS)) as pool:
        list(pool.map(lambda name: check(name, end), HEADS))
    return 0 if rows.all_hold("transfer") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
