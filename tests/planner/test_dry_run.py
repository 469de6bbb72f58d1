"""What `--dry-run` says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.small import small_config
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine.schedules import make_schedule, split_batch
from m3i_scale.objective.m3i import M3I
from m3i_scale.planner.dry_run import describe
from m3i_scale.planner.estimate import Cluster, make_plan
from m3i_scale.planner.gpus import gpu
from m3i_scale.profiling.trace import Trace, trace
from m3i_scale.tasks.pretraining import Pretraining


def report(tree: dict, ranks: int) -> str:
    config = Config.model_validate(tree)
    spec = config.optimizer
    run = SimpleNamespace(
        config=config,
        task=Pretraining(config),
        world=World(0, 0, ranks, torch.device("cpu")),
        sharded=SimpleNamespace(
            model=M3I(config.model, config.objective, config.data.image_size), teacher=None
        ),
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


def test_negatives_of_the_whole_batch_are_said_with_their_cost(small_tree):
    small_tree["optimizer"]["max_micro_batch"] = 2
    small_tree["objective"]["negatives"] = "batch"
    said = report(small_tree, ranks=2)
    assert "negatives come from the whole batch: every micro-batch runs forward twice" in said


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Trace:
    """The small networks in bf16."""
    config = small_config(tmp_path_factory.mktemp("traced"))
    sizes = (config.model, config.objective, config.data.image_size)
    return trace(*sizes, precision="bf16", kernels=False)


@pytest.mark.parametrize(
    "engine",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "zero": {"offload_optimizer": True}},
        {"precision": "bf16", "zero": {"extra": {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True,
                     "bf16_optimizer_states": True}}}},
    ],
)  # fmt: skip
def test_memory_is_that_of_the_plan(small_tree, traced, engine):
    small_tree["engine"] = engine
    config = Config.model_validate(small_tree)
    plan = make_plan(config, traced, Cluster(gpu("h100"), 1, 2))
    said = report(small_tree, ranks=2)
    for where, kinds in (("", plan.state), (" (host)", plan.offloaded)):
        total = sum(kinds.values()) / 2**30
        assert not kinds or f"{'in all' + where:24s} {total:12.3f} GiB" in said
    assert ("(host)" in said) == bool(plan.offloaded)


def test_classes_are_no_samples(small_tree):
    small_tree["optimizer"]["max_micro_batch"] = 2
    targets = small_tree["objective"]["targets"]
    small_tree["objective"]["targets"] = [t for t in targets if t["representation"] != "text"]
    assert "negatives" not in report(small_tree, ranks=2)


def test_how_far_the_teacher_gets_is_said(small_tree):
    small_tree["optimizer"] |= {"duration": "650 steps", "teacher_momentum": 0.9995}
    line = "the teacher forgets its start 0.163 times (momentum 0.9995 to 1); 85 % of the initial"
    assert line in report(small_tree, ranks=1)
    small_tree["optimizer"]["teacher_momentum"] = "by_length"
    assert "forgets its start 7.01 times (momentum 0.978462 to 1)" in report(small_tree, ranks=1)
    targets = small_tree["objective"]["targets"]
    small_tree["objective"]["targets"] = [t for t in targets if t["representation"] == "text"]
    small_tree["objective"]["balance"] = None
    assert "teacher" not in report(small_tree, ranks=1)
