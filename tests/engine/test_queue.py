"""Queues of keys in a real run: equal on all ranks, and part of every checkpoint.

The targets are dense, so that nothing trains the pooling: that must not disturb ZeRO or a resume.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import train_and_resume

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
    "optimizer.max_micro_batch": 2,
}


def test_a_queue_is_equal_on_all_ranks_and_continues_from_a_checkpoint(tmp_path: Path):
    first, second = run_ranks(2, train_and_resume, tmp_path, overrides=OVERRIDES)
    whole, resumed = first["whole"], first["resumed"]
    assert not whole["pooling_trained"]
    assert second["whole"]["filled"] == resumed["filled"] == whole["filled"]
    assert whole["filled"] == {"moco": 32}  # 4 steps of 8, all different
    keys = whole["keys"]["moco"]
    for other in (second["whole"], resumed):
        assert torch.equal(keys, other["keys"]["moco"])
    assert len(keys[:32].unique(dim=0)) == 32
    assert (keys[32:] == 0).all()
    weights, again = whole["weights"], resumed["weights"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
