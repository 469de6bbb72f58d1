"""What `--dry-run` says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine.schedules import make_schedule, split_batch
from m3i_scale.objective.m3i import M3I
from m3i_scale.planner.dry_run import describe


def report(tree: dict, ranks: int) -> str:
    config = Config.model_validate(tree)
    spec = config.optimizer
    run = SimpleNamespace(
        config=config,
        world=World(0, 0, ranks, torch.device("cpu")),
        sharded=SimpleNamespace(model=M3I(config.model, config.objective, config.data.image_size)),
        split=split_batch(spec.global_batch_size, spec.max_micro_batch, ranks),
        schedule=make_schedule(spec, epoch_samples=64),
        save_every=3,
    )
    return describe(run, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("micro", "line"),
    [
        (4, "batch 8 = 4 x 1 accumulated x 2 ranks"),
        (2, "negatives come from the 4 samples of a micro-step"),
    ],
)
def test_accumulation_takes_negatives_away_and_that_is_said(small_tree, micro, line):
    small_tree["optimizer"]["max_micro_batch"] = micro
    said = report(small_tree, ranks=2)
    assert line in said
    assert ("negatives" in said) == (micro == 2)


def test_classes_are_no_samples(small_tree):
    small_tree["optimizer"]["max_micro_batch"] = 2
    targets = small_tree["objective"]["targets"]
    small_tree["objective"]["targets"] = [t for t in targets if t["representation"] != "text"]
    assert "negatives" not in report(small_tree, ranks=2)
