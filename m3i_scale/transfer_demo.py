"""The command `m3i transfer-demo`: what a pre-trained backbone is worth in three other tasks.

Classification, detection and segmentation of characters on photographs, each from the demo's
backbone and from an untrained one, with the same data, steps and heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m3i_scale.demo import CPU_RANKS, M3I, RANKS, execute_all
from m3i_scale.ranks import torchrun

DESCRIPTION = """Train a classifier, a detector and a segmenter twice each: from the backbone of
`m3i demo`, and from an untrained one; then compare them on typefaces and photographs that
neither has seen.

Runs these commands one after the other, prints each, and stops at the first that fails; about a
quarter of an hour on two cores. The same command again goes on with an interrupted run.

  m3i pasted; m3i export; six times torchrun -m m3i_scale.train; a table and a picture"""

DATA = Path("data_demo/pasted")
# One character an image, as large in it as in pre-training: heads of so few steps see it whole.
SET = (
    "--image-size", "64", "--objects", "1", "--sizes", "0.5", "0.9",
    "--train", "3000", "--val", "300",
)  # fmt: skip
BACKBONE = Path("data_demo/backbone.safetensors")
RUNS = Path("runs/transfer_demo")
STARTS = ("pretrained", "untrained")


class Row(NamedTuple):
    """A figure of a task."""

    task: str
    figure: str  # its name in the metrics
    title: str


ROWS = (
    Row("classification", "top1", "classification, top-1"),
    Row("detection", "box_AP", "detection, box AP"),
    Row("detection", "box_AP50", "detection, box AP50"),
    Row("segmentation", "mIoU", "segmentation, mIoU"),
)
TASKS = tuple(dict.fromkeys(row.task for row in ROWS))


def register(subparsers: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`; it sets `run(args) -> int`."""
    parser = subparsers.add_parser(
        "transfer-demo",
        help="classify, detect and segment from the demo's backbone and without it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", dest="source", type=Path, default=Path("runs/demo"), metavar="FOLDER",
        help="the pre-trained run (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="changes to all six configurations"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i transfer-demo`.

    Raises:
        ValueError: there is no pre-trained run.
    """
    if not any(options.source.glob("checkpoints/step-*/complete.json")):
        raise ValueError(
            f"{options.source} has no checkpoint to start from: run `m3i demo` first, or name a "
            "finished run of its configuration with --run"
        )
    code = execute_all("m3i transfer-demo", commands(options.source, options.overrides))
    if code:
        return code
    found = {(task, start): evaluations(folder(task, start)) for task in TASKS for start in STARTS}
    text = table(found)
    (RUNS / "table.md").write_text(text)
    draw(found, RUNS / "transfer.png")
    print(f"\n{text}\nTable, picture, and the pictures of each run: {RUNS}/")
    return 0


def folder(task: str, start: str) -> Path:
    """The run of a task from a start."""
    return RUNS / f"{task}_{start}"


def commands(source: Path, overrides: list[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The commands, and the variables that each needs."""
    yield [*M3I, "pasted", "--out", str(DATA), *SET], {}
    yield [*M3I, "export", "--run", str(source), "--out", str(BACKBONE)], {}
    for task in TASKS:
        for start in STARTS:
            init = str(BACKBONE) if start == "pretrained" else "null"
            name = folder(task, start)
            own = [f"folder={name.parent}", f"run={name.name}", f"model.init={init}"]
            launcher = [*torchrun(RANKS), "-m", "m3i_scale.train"]
            config = f"m3i:transfer/demo/{task}"
            yield [*launcher, "--config", config, *overrides, *own], CPU_RANKS


def evaluations(run_folder: Path) -> dict[int, dict[str, float]]:
    """Figures of each evaluation of a run, by the number of steps."""
    found = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        figures = {
            name.removeprefix("evaluation/"): value
            for name, value in values.items()
            if name.startswith("evaluation/")
        }
        if figures:
            found[values["step"] + 1] = figures
    return found


Found = dict[tuple[str, str], dict[int, dict[str, float]]]


def table(found: Found) -> str:
    """The last evaluations as Markdown."""
    lines = [
        "| held-out typefaces and photographs | from the demo's backbone | untrained |",
        "| --- | --- | --- |",
    ]
    for row in ROWS:
        last = [list(found[row.task, start].values())[-1].get(row.figure, 0.0) for start in STARTS]
        lines.append(f"| {row.title} | {last[0]:.1f} | {last[1]:.1f} |")
    return "\n".join(lines) + "\n"


def draw(found: Found, path: Path) -> None:
    """Each figure over the steps of training, from both starts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(ROWS), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(ROWS), squeeze=False)[0]
    for axis, row in zip(axes, ROWS, strict=True):
        for start in STARTS:
            points = found[row.task, start]
            axis.plot(list(points), [p.get(row.figure, 0.0) for p in points.values()], "o-",
                      label=start)  # fmt: skip
        axis.set_title(row.title, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
