"""Frozen teachers in a real run: outside of ZeRO and checkpoints, and the same at every resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.ranks import run_ranks, start_program, wait_all
from helpers.shards import write_images
from helpers.small import labelled_tree, small_config, small_targets
from helpers.teachers import (
    ARCHITECTURE,
    TINY,
    write_clip_folder,
    write_timm_file,
    write_timm_folder,
)
from helpers.training import open_small, train_and_resume
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError, load_run
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.memory import FROZEN
from m3i_scale.planner import dry_run
from m3i_scale.planner.estimate import Cluster, make_plan, trace_of
from m3i_scale.planner.gpus import gpu
from m3i_scale.transfer.loading import build_trained

pytestmark = pytest.mark.distributed

DENSE = {
    "name": "patches",
    "representation": "features",
    "encoder": "tiny",
    "regularisation": "none",
    "likelihood": {"form": "gaussian"},
    "normalise": "layer_norm",
    "centre": "running",
}
WHOLE = {
    "name": "whole",
    "representation": "global",
    "view": "other",
    "encoder": "small",
    "regularisation": "negatives",
    "likelihood": {"form": "boltzmann", "queue": 11},
    "normalise": "l2",
}


def overrides(folder: Path) -> dict[str, Any]:
    """Two frozen teachers beside the moving average, a step of two micro-batches in two passes."""
    file = {"source": str(folder / "small.safetensors"), "architecture": ARCHITECTURE}
    file |= {"options": TINY | {"img_size": 48, "global_pool": "avg"}, "image_size": 48}
    return {
        "model.frozen_teachers": {"tiny": {"source": str(folder / "tiny")}, "small": file},
        "model.global_head": {"hidden": 20, "width": 12},
        "objective.targets": [*small_targets("image_i", "text_j"), DENSE, WHOLE],
        "objective.negatives": "batch",
        "optimizer.max_micro_batch": 2,
        "engine.zero.persistence_threshold": 300,
    }


def train_resume_and_change(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """`train_and_resume`; then what a resume says of files that are others, or elsewhere."""
    changes = overrides(folder) | {"engine.zero.stage": stage}
    found = train_and_resume(world, folder, changes)
    if stage < 3:  # the rest is the same at all stages
        return found
    moved = changes | {"model.frozen_teachers.tiny": {"source": str(folder / "moved")}}
    run = open_small(world, folder, moved)  # the same weights in another place
    found["names"] = sorted(name for name, _ in run.sharded.model.named_parameters())
    found["said"] = dry_run.describe(run, {})
    sentences = []
    for source in ("other0", f"other{world.rank}"):
        other = changes | {"model.frozen_teachers.tiny": {"source": str(folder / source)}}
        with pytest.raises(ConfigError) as caught:
            open_small(world, folder, other)
        sentences.append(str(caught.value))
    return found | {"sentences": sentences}


@pytest.mark.parametrize("stage", [3, 1])
def test_a_resume_is_exact_and_of_the_same_teachers(tmp_path: Path, stage: int):
    write_timm_file(tmp_path / "small.safetensors", img_size=48, global_pool="avg")
    for number, name in enumerate(("tiny", "moved", "other0", "other1")):
        write_timm_folder(tmp_path / name, img_size=64)
        if name.startswith("other"):
            state = load_file(tmp_path / name / "model.safetensors")
            state["norm.bias"] += number
            save_file(state, tmp_path / name / "model.safetensors")
    results = run_ranks(2, train_resume_and_change, tmp_path, stage=stage)
    whole, resumed = results[0]["whole"], results[0]["resumed"]
    weights, again = whole["weights"], resumed["weights"]
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for part in ("centres", "keys"):
        for found in (resumed, results[1]["whole"]):
            assert whole[part].keys() == found[part].keys() != set()
            assert all(torch.equal(whole[part][n], found[part][n]) for n in whole[part])
    assert whole["held"][FROZEN] > 0
    if stage < 3:
        return
    assert not [name for name in results[0]["names"] if name.startswith("frozen.")]
    assert any(name.startswith("decoders.tiny.") for name in results[0]["names"])
    for result in results:
        changed, differing = result["sentences"]
        assert "model.frozen_teachers.tiny.sha256 was" in changed
        assert "--accept-change model.frozen_teachers.tiny.sha256" in changed
        assert "model.frozen_teachers.tiny has other weights on rank " in differing
    config = small_config(tmp_path, overrides(tmp_path))
    plan = make_plan(config, trace_of(config), Cluster(gpu("h100"), 1, 2))
    assert plan.state[FROZEN] == whole["held"][FROZEN]
    assert plan.flops.parts["frozen teachers"].forward > 0
    assert plan.flops.parts["frozen teachers"].backward == 0
    said = results[0]["said"]
    assert f"  {'frozen networks':24s}" in said
    assert "frozen teacher tiny: timm's vit_tiny_patch16_224 from " in said


def test_the_flops_of_a_frozen_teacher_are_those_of_its_images(tmp_path: Path):
    write_timm_folder(tmp_path / "tiny", img_size=64)
    write_timm_file(tmp_path / "small.safetensors", img_size=48, global_pool="avg")
    changes = overrides(tmp_path) | {"objective.targets": [DENSE], "objective.balance": None}

    def flops(**more: Any) -> float:
        config = small_config(tmp_path, changes | more)
        return make_plan(
            config, trace_of(config), Cluster(gpu("h100"), 1, 2)
        ).flops.parts["frozen teachers"].forward  # fmt: skip

    tokens, width = 16 + 1, TINY["embed_dim"]
    block = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 4 * tokens * tokens * width
    assert flops() == pytest.approx(2 * 16 * width * 3 * 16**2 + TINY["depth"] * block)
    larger = {"model.frozen_teachers": changes["model.frozen_teachers"] | {
        "tiny": {"source": str(tmp_path / "tiny"), "image_size": 128}}}  # fmt: skip
    assert flops(**larger) > 4 * flops()


def test_the_shipped_method_runs_without_a_network(tmp_path: Path):
    """As documented: a file that lays it over a run, and folders in the place of names."""
    write_timm_folder(tmp_path / "dino", img_size=112)
    write_clip_folder(tmp_path / "clip")
    index = write_images(tmp_path, "classes", range(16), "category")
    changes = {"folder": str(tmp_path / "runs"), "optimizer.duration": "2 steps"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(labelled_tree(index, changes)))
    method = Path(__file__).parents[2] / "configs" / "methods" / "frozen_teachers.yaml"
    base = {"base": ["run.yaml", str(method)], "run": "distilled"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(base))
    words = ["--config", str(tmp_path / "c.yaml"), "model.global_head={hidden: 16, width: 8}"]
    words += [f"model.frozen_teachers.{n}.source={tmp_path / n}" for n in ("dino", "clip")]
    process = start_program("m3i_scale.train", words, tmp_path / "output.txt")
    (said,) = wait_all([process], 240)
    assert process.returncode == 0, said
    lines = (tmp_path / "runs" / "distilled" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert len(values) == 2
    assert all(math.isfinite(v[f"loss/{name}"]) for v in values for name in ("dino", "clip"))
    config = load_run(tmp_path / "runs" / "distilled" / "config.yaml")
    kept = tmp_path / "runs" / "distilled" / "checkpoints" / "step-00000002"
    reader = CheckpointReader(kept)
    trained = build_trained(config, reader)  # without the teachers
    reader.close()
    assert not list(trained.frozen_heads)
