"""Queues of keys in a real run: equal on all ranks, and part of every checkpoint.

The targets are dense, so that nothing trains the pooling: that must not disturb ZeRO or a resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import full_weights, open_small
from ranks import run_ranks

from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop, metrics
from m3i_scale.engine.stop import StopFlag

pytestmark = pytest.mark.distributed

MOCO = {
    "name": "moco",
    "view": "other",
    "representation": "features",
    "decoder": "projector",
    "regularisation": "negatives",
    "likelihood": {"form": "boltzmann", "candidates": "own", "queue": 37},
    "normalise": "l2",
}
OVERRIDES = {
    "objective.targets": [MOCO],
    "objective.balance": None,
    "objective.input": {"corruption": "none"},
    "model.global_head": {"hidden": 20, "width": 12, "predictor": False},
    "optimizer.duration": "4 steps",
    "optimizer.max_micro_batch": 2,
    "checkpoint.every": "2 steps",
}


def train_and_resume(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Four steps; then the last two once more, from the checkpoint after the second."""
    found = {}
    kept = folder / "small" / "checkpoints" / "step-00000002"
    for name, resume in (("whole", "never"), ("resumed", str(kept))):
        run = open_small(world, folder, overrides, resume)
        record = metrics.MetricLog(
            run.folder, is_main=world.is_main, total=4, first=run.progress.step, tensorboard=False
        )
        loop.pretrain(run, StopFlag(), record)
        record.close()
        queue = run.sharded.model.queues["moco"]
        assert not any(
            p.requires_grad for p in run.sharded.model.student.backbone.pooling.parameters()
        )
        found[name] = {"weights": full_weights(run), "keys": queue.keys, "filled": queue.filled}
    return found


def test_a_queue_is_equal_on_all_ranks_and_continues_from_a_checkpoint(tmp_path: Path):
    first, second = run_ranks(2, train_and_resume, tmp_path, overrides=OVERRIDES)
    for name in ("keys", "filled"):
        assert torch.equal(first["whole"][name], second["whole"][name])
        assert torch.equal(first["whole"][name], first["resumed"][name])
    assert first["whole"]["filled"] == 32  # 4 steps of 8, all different
    keys = first["whole"]["keys"]
    assert len(keys[:32].unique(dim=0)) == 32
    assert (keys[32:] == 0).all()
    weights = (first[k]["weights"] for k in ("whole", "resumed"))
    a, b = weights
    assert all(torch.equal(a[name], b[name]) for name in a)
