"""A run from given weights: student and teacher on several ranks, its record, and its resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.ranks import run_ranks
from helpers.small import small_config
from helpers.training import full_weights, open_small, train
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.engine.checkpoint import extent
from m3i_scale.engine.state import snapshot
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.weights import hub_name
from m3i_scale.planner import dry_run


def write_weights(path: Path) -> None:
    """A classifier as published, of the small configuration's sizes: it has no fused map."""
    options = small_config(path.parent).model.backbone.options
    options = {k: v for k, v in options.items() if not k.startswith("clip_")}
    torch.manual_seed(7)
    model = InternImage(**options, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file({hub_name(n): p for n, p in model.state_dict().items()}, path)


def start_and_resume(
    world: World, folder: Path, overrides: dict[str, Any], file: str
) -> dict[str, Any]:
    """Names of weights that are not what they should be; reports; what a resume says."""
    state = load_file(file)
    run = open_small(world, folder, overrides, "never")
    tensors, _ = snapshot(run.sharded, world, run.progress, run.task)
    wrong, fp32 = [], run.config.engine.precision == "fp32"
    for name in run.initial.names:  # type: ignore[union-attr]
        value = state[hub_name(name)]
        own = extent(value.numel(), world.rank, world.size)
        part = value.flatten()[own.start : own.stop]
        keys = [f"weight/student.backbone.{name}", f"teacher/student.backbone.{name}"]
        wrong += [key for key in keys if not torch.equal(tensors[key], part)]
    for name, weight in full_weights(run).items():
        inner = hub_name(name.split("backbone.")[-1])
        if "backbone." in name and inner in state:
            value = state[inner] if fp32 else state[inner].bfloat16()
            wrong += [] if torch.equal(weight, value) else [name]
    found: dict[str, Any] = {"wrong": wrong, "dry": dry_run.describe(run, {})}
    found["finished"] = train(run)
    torch.distributed.barrier()
    if world.is_main:
        Path(file).unlink()
    torch.distributed.barrier()
    longer = overrides | {"optimizer.duration": "3 steps"}
    again = open_small(world, folder, longer)
    found["resumed"] = [again.progress.step, dry_run.describe(again, {})]
    said = []
    for other in ("elsewhere.safetensors", None):
        try:
            open_small(world, folder, longer | {"model.init": other})
        except ConfigError as error:
            said.append(str(error))
    try:  # from the beginning, with a file that is gone
        open_small(world, folder, overrides, "never")
    except ConfigError as error:
        said.append(str(error))
    return found | {"said": said}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "teacher", "stage"),
    [("fp32", "whole", 3), ("bf16", "sharded", 3), ("bf16", "whole", 1)],
)
def test_a_run_starts_from_weights_and_resumes_without_them(
    tmp_path: Path, precision: str, teacher: str, stage: int
):
    file = tmp_path / "published.safetensors"
    write_weights(file)
    overrides = {
        "model.init": str(file), "engine.precision": precision, "engine.teacher": teacher,
        "optimizer.duration": "2 steps", "optimizer.warmup": "0 steps",
        "engine.zero.persistence_threshold": 500, "engine.zero.stage": stage,
    }  # fmt: skip
    for found in run_ranks(2, start_and_resume, tmp_path, overrides=overrides, file=str(file)):
        assert found["wrong"] == []
        assert f"model.init {file}\n  loaded " in found["dry"]
        assert "  new: " in found["dry"]
        assert "clip_projector" in found["dry"]
        assert "  left out of the file: " in found["dry"]
        assert found["finished"]
        step, report = found["resumed"]
        assert step == 2
        assert "is not read: the run goes on from its checkpoint" in report
        changed, removed, gone = found["said"]
        assert "model.init was" in changed
        assert "--accept-change model.init" in changed
        assert "model.init was" in removed
        assert "no file or folder" in gone
    record = json.loads((tmp_path / "small" / "init.json").read_text())
    assert record["init"] == str(file)
    assert list(record["sha256"]) == [str(file)]
    assert len(record["loaded"]) > 50
