"""Master weights, gradients and Adam moments in bf16: for machines whose memory holds no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import full_weights, open_small
from ranks import run_ranks

from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop
from m3i_scale.engine.memory import held_memory
from m3i_scale.engine.state import snapshot

pytestmark = pytest.mark.distributed

BF16_STATES = {
    "engine.precision": "bf16",
    "engine.zero.extra": {
        "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "communication_data_type": "bf16",
        "zero_optimization": {"sub_group_size": 10_000},
    },
    "checkpoint.background": False,
    "optimizer.max_micro_batch": 2,
}


def train_and_resume(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; and a second run from that checkpoint."""
    weights, averages = [], []
    for resume in ("never", "auto"):
        run = open_small(world, folder, overrides, resume)
        batches = loop.open_batches(run)
        while run.progress.step < 4:
            _, updated = loop.train_step(run, batches)
            assert updated
            run.progress.step += 1
            run.progress.position += run.split.batch
            if run.progress.step == 2:
                loop.save(run)
        weights.append(full_weights(run))
        averages.append(
            {
                key: tensor.clone()
                for key, tensor in snapshot(run.sharded, world, run.progress, run.balance)[
                    0
                ].items()
                if key.startswith("teacher/")
            }
        )
    return {"weights": weights, "averages": averages, "held": held_memory(run.sharded)}


def test_averages_stay_fp32_and_a_resumed_run_is_bitwise_the_undisturbed_one(tmp_path: Path):
    for result in run_ranks(2, train_and_resume, tmp_path, overrides=BF16_STATES):
        assert result["held"]["master weights"] == 0  # the compute weights themselves
        for kind, dtype in (("weights", torch.bfloat16), ("averages", torch.float32)):
            whole, resumed = result[kind]
            assert {tensor.dtype for tensor in whole.values()} == {dtype}
            assert all(torch.equal(whole[name], resumed[name]) for name in whole), kind
