"""Negatives of the whole batch on real ranks: any split of a batch is the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import full_weights, open_small
from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop

pytestmark = pytest.mark.distributed

GAUSSIAN = {
    "representation": "features",
    "regularisation": "stop_gradient",
    "likelihood": {"form": "gaussian"},
    "normalise": "layer_norm",
}
TEXT = {
    "representation": "text",
    "regularisation": "negatives",
    "likelihood": {"form": "boltzmann", "learnable": True, "symmetric": True},
}
QUEUED = {
    "representation": "global",
    "view": "other",
    "regularisation": "negatives",
    "likelihood": {"form": "boltzmann", "queue": 19, "temperature": 0.2},
    "normalise": "l2",
}
OVERRIDES = {
    "objective.targets": [
        GAUSSIAN | {"name": "image_i", "centre": "batch"},
        GAUSSIAN | {"name": "image_j", "image": "j", "view": "other", "centre": "running"},
        TEXT | {"name": "text_i"},
        TEXT | {"name": "text_j", "image": "j"},
        QUEUED | {"name": "moco"},
    ],
    "objective.negatives": "batch",
    "model.global_head": {"hidden": 20, "width": 12},
    "model.backbone.options.drop_path_rate": 0.3,
    "model.backbone.options.drop_path_type": "uniform",
    "optimizer.global_batch_size": 12,
    "optimizer.learning_rate": 1e-4,
    "optimizer.duration": "5 steps",
}


def three_steps(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Figures of three steps, the first one's gradients in full, and what is kept at the end."""
    from deepspeed.utils import safe_get_full_grad

    run = open_small(world, folder, overrides)
    engine, model = run.sharded.engine, run.sharded.model
    partitioned = run.config.engine.zero.stage == 3
    gradients: dict[str, torch.Tensor] = {}
    original, teacher = engine.step, []

    def step() -> None:
        if partitioned and engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = safe_get_full_grad(parameter).clone()
        original()

    def encode(*inputs: Any) -> None:
        teacher.append(len(inputs))

    engine.step = step
    model.teacher.backbone.patch_embed.register_forward_pre_hook(encode)
    batches = loop.open_batches(run)
    figures = []
    for _ in range(3):
        figures.append(loop.train_step(run, batches)[0])
        run.progress.step += 1
    known = []
    if partitioned:
        known = [engine.optimizer.parameter_offload.param_coordinator, run.sharded.first_pass._own]
    return {
        "figures": figures,
        "gradients": gradients,
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "weights": full_weights(run),
        "teacher": len(teacher),
        "known": [part.is_complete_trace() for part in known],
    }


def run_split(folder: Path, ranks: int, micro_batch: int, **keys: Any) -> dict[str, Any]:
    overrides = OVERRIDES | {"optimizer.max_micro_batch": micro_batch}
    return run_ranks(ranks, three_steps, folder, overrides=overrides | keys)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, one micro-batch: nothing has to be put together."""
    return run_split(tmp_path_factory.mktemp("whole"), 1, 12)


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "keys"),
    [
        (2, 2, {}),
        (1, 4, {"engine.teacher": "sharded", "model.backbone.options.checkpoint_blocks": True}),
        (2, 2, {"engine.zero.stage": 1}),
    ],
    ids=["2 ranks x 3 x 2", "1 rank x 3 x 4", "stage 1"],
)
def test_any_split_of_a_batch_is_the_same_step(
    whole: dict[str, Any], tmp_path: Path, ranks: int, micro_batch: int, keys: dict[str, Any]
):
    parts = run_split(tmp_path, ranks, micro_batch, **keys)
    names = {name for name in whole["figures"][0] if name.startswith(("loss/", "accuracy/"))}
    names |= {"gradient/ssp", "gradient/sp", "balance/lambda", "temperature/text_i"}
    for step, (a, b) in enumerate(zip(whole["figures"], parts["figures"], strict=True)):
        # Adam makes a full step of what rounds to nothing: later steps agree less.
        tolerance = 1e-6 if step == 0 else 1e-3
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=tolerance)
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=max(tolerance, 1e-5), abs=1e-6), name
    if parts["gradients"]:
        a, b = (torch.cat([g.flatten() for g in r["gradients"].values()]) for r in (whole, parts))
        assert (a - b).norm() < 2e-6 * a.norm()
    else:
        assert keys["engine.zero.stage"] == 1  # gradients have gone before they can be gathered
    for name, buffer in whole["buffers"].items():
        torch.testing.assert_close(parts["buffers"][name], buffer, rtol=1e-2, atol=1e-2)
    # The teacher sees each sample once, and ZeRO knows the order of both kinds of passes.
    assert parts["teacher"] == 3 * 3
    assert all(parts["known"])
