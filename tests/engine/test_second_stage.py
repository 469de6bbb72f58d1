"""A stage at higher resolutions that starts from another run: on other ranks, and its resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import curve, open_small, train, train_and_resume
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.engine.checkpoint import CheckpointReader, complete_checkpoints, extent
from m3i_scale.engine.state import snapshot
from m3i_scale.planner import dry_run

VIT = {"width": 32, "depth": 1, "heads": 2, "pool_heads": 2, "embed_dim": 24}
FIRST: dict[str, Any] = {
    "model.backbone": {"name": "vit", "options": VIT},
    "optimizer.duration": "2 steps",
    "optimizer.warmup": "0 steps",
    "engine.zero.persistence_threshold": 500,
}
POSITIONS = {"model.decoder.position_grid": 4, "model.backbone.options": VIT | {"position_grid": 4}}


def second(first: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Overrides of the stage that starts from the run `small` under `first`."""
    larger = {
        "model.init": str(first / "small"),
        "data.image_size": 96,
        "data.mixed_sizes": [{"size": 64}, {"size": 96}],
        "optimizer.max_micro_batch": 2,
        "optimizer.duration": "4 steps",
        "seed": 1,  # whose last steps are of both sizes
    }
    return FIRST | larger | POSITIONS | (changes or {})


def train_first(world: World, folder: Path, overrides: dict[str, Any]) -> bool:
    return train(open_small(world, folder, overrides, "never"))


def start_second(world: World, folder: Path, first: str) -> dict[str, Any]:
    """What differs from the first stage at the start; reports, refusals, a run and its resume."""
    kept = complete_checkpoints(Path(first) / "small" / "checkpoints")[-1]
    reader = CheckpointReader(kept)
    run = open_small(world, folder, second(Path(first)), "never")
    tensors, state = snapshot(run.sharded, world, run.progress, run.task)
    wrong = []
    for name, shape in reader.shapes.items():
        own = extent(torch.Size(shape).numel(), world.rank, world.size)
        for kind in ("weight", *(["teacher"] if name.startswith("student.") else [])):
            same = torch.equal(tensors[f"{kind}/{name}"], reader.slice(kind, name, *own))
            wrong += [] if same else [f"{kind}/{name}"]
        wrong += [name] if tensors[f"exp_avg_sq/{name}"].any() else []
    options: dict[str, dict[str, Any]] = {
        "unsaid": {
            "model.decoder.position_grid": None,
            "model.backbone.options": VIT,
            "data.mixed_sizes": None,
        },
        "vit": {"model.backbone.options": VIT},
        "heads": {"model.text.heads": 2},
        "depth": {"model.text.depth": 2},
        "itself": {"folder": first},
        "none": {"model.init": str(Path(first) / "empty")},
        "damaged": {"model.init": str(Path(first) / "damaged")},
    }
    said = {}
    for what, changes in options.items():
        try:
            open_small(world, folder, second(Path(first), changes), "never")
        except ConfigError as error:
            said[what] = str(error)
    found = {
        "wrong": wrong,
        "state": [state["step"], state["position"], state["adam_step"]],
        "dry": dry_run.describe(run, {}),
        "said": said,
    }
    return found | {"runs": train_and_resume(world, folder, second(Path(first)))}


@pytest.mark.distributed
def test_a_stage_at_a_higher_resolution(tmp_path: Path):
    first, folder = tmp_path / "first", tmp_path / "second"
    assert run_ranks(1, train_first, first, overrides=FIRST) == [True]
    whole = complete_checkpoints(first / "small" / "checkpoints")[-1]
    bad = first / "damaged" / "checkpoints" / whole.name
    bad.mkdir(parents=True)
    (first / "empty" / "checkpoints").mkdir(parents=True)
    for file in whole.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (bad / "state.json").write_bytes((bad / "state.json").read_bytes() + b" ")
    for found in run_ranks(2, start_second, folder, first=str(first)):
        assert found["wrong"] == []
        assert found["state"] == [0, 0, 0]
        for line in (
            f"model.init {first / 'small'}\n  loaded ",
            "images of 96 pixels, before 64",
            "images of 50 % at 64, 50 % at 96 pixels, drawn for each step",
            "batch 8 = 2 x 2 accumulated x 2 ranks",
            "model.decoder.position_grid: positions of 6 x 6 patches are laid over 4 x 4",
            "model.backbone.options.position_grid: positions of 6 x 6 patches",
            "begin anew: the optimiser's moments",
        ):
            assert line in found["dry"], line
        assert "\n  new: " not in found["dry"]
        for what, words in {
            "unsaid": "trained on 4 x 4 patches and this run has 6 x 6; set "
            "model.decoder.position_grid=4 model.backbone.options.position_grid=4, so that",
            "vit": "several sizes (data.mixed_sizes) has one grid of positions; set "
            "model.backbone.options.position_grid=6",
            "heads": "model.text.heads=4; set model.text.heads=4",
            "depth": " parameters differ, for instance text_tower.",
            "itself": "is this run itself",
            "none": "has no complete checkpoint",
            "damaged": "all its checkpoints are damaged",
        }.items():
            assert words in found["said"].get(what, ""), (what, found["said"])
        whole_run, resumed = found["runs"]["whole"], found["runs"]["resumed"]
        for kind in ("weights", "averages"):
            assert whole_run[kind].keys() == resumed[kind].keys()
            for name, value in whole_run[kind].items():
                assert torch.equal(value, resumed[kind][name]), name
    sizes = curve(folder, "image_size")  # the same in the resumed steps, too
    assert sizes.keys() == {0, 1, 2, 3}
    assert set(sizes.values()) == {64.0, 96.0}
    assert len({sizes[2], sizes[3]}) == 2  # of those that are made twice
    record = json.loads((folder / "small" / "init.json").read_text())
    assert record["checkpoint"] == str(whole)
    assert (record["step"], record["samples"]) == (2, 16)
    marker = json.loads((whole / "complete.json").read_text())
    assert record["lineage"] == marker["lineage"]
    assert len(record["sha256"]) == 2
