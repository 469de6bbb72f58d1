"""Master weights, gradients and Adam moments in bf16: for machines whose memory holds no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import train_and_resume

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


@pytest.mark.parametrize("stage", [3, 1])
def test_averages_stay_fp32_and_a_resumed_run_is_bitwise_the_undisturbed_one(
    tmp_path: Path, stage: int
):
    overrides = BF16_STATES | {"engine.zero.stage": stage}
    for result in run_ranks(2, train_and_resume, tmp_path, overrides=overrides):
        held = result["resumed"]["held"]
        if stage == 3:
            assert held["master weights"] == 0  # the compute weights themselves
        for kind, dtype in (("weights", torch.bfloat16), ("averages", torch.float32)):
            whole, resumed = (result[name][kind] for name in ("whole", "resumed"))
            assert {tensor.dtype for tensor in whole.values()} == {dtype}
            assert all(torch.equal(whole[name], resumed[name]) for name in whole), kind
