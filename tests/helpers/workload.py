"""A very small pre-training run: data, configuration, and its loss curve by step."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.run_folder import captioned_config
from helpers.shards import write_images
from helpers.small import small_targets
from m3i_scale.config import SourceKind, dump_config
from m3i_scale.engine.lines import of_training

STEPS = 32
OVERRIDES = {
    "run": "unnamed",
    "model.backbone": {
        "name": "vit",
        "options": {"width": 32, "depth": 2, "heads": 2, "pool_heads": 2, "embed_dim": 24},
    },
    "objective.targets": small_targets("image_i", "text_i", "category_j"),
    "optimizer.duration": f"{STEPS} steps",
    "engine.timeout_minutes": 2,
    "checkpoint.every": "4 steps",
}


def write_workload(folder: Path) -> Path:
    """Write data and configuration into the folder; the configuration's path.

    Args:
        folder: also gets `heldout.parquet`, images that are not trained on.
    """
    counts: dict[SourceKind, int] = {"text": 96, "category": 64}
    sources = [
        {"name": kind, "index": write_images(folder, kind, range(count), kind), "kind": kind}
        for kind, count in counts.items()
    ]
    write_images(folder, "heldout", range(100, 120), "category")
    config = captioned_config(folder, OVERRIDES | {"data.sources": sources})
    path = folder / "small.yaml"
    path.write_text(dump_config(config))
    return path


def steps_done(run_folder: Path) -> int:
    """Steps that the metrics of a run tell of so far."""
    path = run_folder / "metrics.jsonl"
    return max(curve(run_folder), default=-1) + 1 if path.exists() else 0


def curve(run_folder: Path) -> dict[int, dict[str, float]]:
    """Everything measured of each step that repeats; what ran twice must be the same.

    Raises:
        AssertionError: it did not.
    """
    found: dict[int, dict[str, float]] = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # being written
            break
        values = json.loads(line, parse_constant=str)  # or NaN would differ from itself
        step = values.pop("step")
        kept = of_training(values)
        assert found.setdefault(step, kept) == kept, f"step {step} differs when repeated"
    return found
