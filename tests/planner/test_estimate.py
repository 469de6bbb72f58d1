"""The plan against real ranks: bytes held, bytes on the wire, bytes that wait for the backward."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.measured import Allocations, Wire, require_state
from helpers.ranks import run_ranks
from helpers.small import random_batch, small_config
from helpers.training import open_small
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine import loop
from m3i_scale.engine.memory import held_memory
from m3i_scale.planner.estimate import Assumptions, Cluster, Plan, make_plan, trace_of
from m3i_scale.planner.gpus import gpu
from m3i_scale.profiling.trace import Trace
from m3i_scale.tasks.pretraining import Pretraining

RANKS = 2

MEDIUM = {
    "model.backbone.options": {
        "channels": 32, "depths": [1, 1, 3, 1], "groups": [2, 4, 8, 16], "dw_kernel_size": 5,
        "center_feature_scale": True, "res_post_norm": True, "clip_projector_width": 128,
        "clip_heads": 4, "clip_embed_dim": 96,
    },
    "model.decoder": {"depth": 2, "width": 96, "heads": 4, "ffn": 200},
    "model.text": {
        "tokenizer": "none", "vocab_size": 501, "depth": 2, "width": 64, "heads": 4, "ffn": 128,
        "max_length": 8, "embed_dim": 256,
    },
    "optimizer.global_batch_size": 16,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    # Two micro-steps, checkpointing; sizes that two ranks cannot share evenly; little prefetching.
    "bf16": {
        "engine.precision": "bf16",
        "engine.zero.persistence_threshold": 3_001,
        "engine.zero.prefetch_bucket": 40_000,
        "engine.zero.reduce_bucket": 150_000,
        "engine.zero.max_live_parameters": 250_000,
        "engine.zero.extra": {"zero_optimization": {"stage3_max_reuse_distance": 200_000}},
        "optimizer.max_micro_batch": 4,
        "model.backbone.options.checkpoint_blocks": True,
        "model.text.checkpoint_blocks": True,
    },
    # One micro-step, no persistent parameters, everything prefetched and kept.
    "fp32": {"engine.zero.persistence_threshold": 0, "optimizer.max_micro_batch": 8},
    # Two micro-steps; several buckets.
    "stage 1": {
        "engine.zero.stage": 1,
        "engine.precision": "bf16",
        "engine.zero.reduce_bucket": 150_000,
        "optimizer.max_micro_batch": 4,
    },
    "stage 2": {
        "engine.zero.stage": 2,
        "engine.precision": "bf16",
        "engine.zero.reduce_bucket": 150_000,
        "optimizer.max_micro_batch": 4,
        "model.backbone.options.checkpoint_blocks": True,
    },
}
# Four micro-steps of samples that are compared with each other, each of them twice.
CASES["two passes"] = CASES["bf16"] | {
    "objective.negatives": "batch",
    "optimizer.max_micro_batch": 2,
}


def measure(world: World, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case's fifth step: bytes held, on the wire, and at its turns to the backward pass."""
    found = {}
    for name, overrides in cases.items():
        run = open_small(world, folder / name, overrides)
        batches = loop.open_batches(run)
        for _ in range(3):  # ZeRO-3 knows the order of modules from the third on
            loop.train_step(run, batches)
        held = held_memory(run.sharded)
        with Wire() as wire:
            loop.train_step(run, batches)
        forward, turns = run.sharded.engine.forward, []

        def watched(*arguments: Any, step: Any, forward: Any = forward, turns: Any = turns) -> Any:
            with Allocations() as allocations:
                outputs = forward(*arguments, step=step)
            turns.append(allocations.alive())
            return outputs

        run.sharded.engine.forward = watched
        loop.train_step(run, batches)
        found[name] = {"held": held, "wire": dict(wire.sizes), "turns": turns}
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    cases = {name: MEDIUM | case for name, case in CASES.items()}
    return run_ranks(RANKS, measure, folder, cases=cases)[0]


@functools.cache  # a trace takes seconds, and all tests of a case read the same plan
def plan_of(name: str) -> Plan:
    config = small_config(Path("runs"), MEDIUM | CASES[name])
    return make_plan(config, trace_of(config), Cluster(gpu("h100"), 1, RANKS))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_ranks_hold(case: str, measured: dict[str, Any]):
    require_state(plan_of(case).state, measured[case]["held"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_traffic_is_what_ranks_send(case: str, measured: dict[str, Any]):
    plan = plan_of(case)
    planned: Counter[str] = Counter()
    for traffic in plan.flow.traffic:
        planned[traffic.name.split(",")[0]] += traffic.size  # type: ignore[assignment]
        assert traffic.sent == pytest.approx(
            traffic.size * (0.5 if "all-reduce" not in traffic.name else 1.0)
        )
    for kind, size in measured[case]["wire"].items():
        if size < 4096 and kind == "all-reduce":
            continue  # norms and figures, which the plan leaves out
        assert planned[kind] == pytest.approx(size, rel=0.1), kind


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_what_waits_for_the_backward_pass_is_what_a_forward_pass_allocates(
    case: str, measured: dict[str, Any]
):
    plan = plan_of(case)
    waiting = plan.passing["activations"] + plan.waiting_parameters
    # The first micro-step's forward pass gathers the small parameters, which then stay.
    assert waiting == pytest.approx(max(measured[case]["turns"]), rel=0.1)


def test_the_batch_waits_on_the_host_where_it_is_read_twice():
    plan = plan_of("two passes")
    sizes: list[int] = []
    batch = random_batch(plan.batch.micro * plan.batch.accumulation)
    batch.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    assert plan.held == pytest.approx(sum(sizes), rel=0.02)
    assert plan_of("bf16").held == 0


@pytest.fixture(scope="module")
def whole() -> tuple[Config, Trace]:
    config = small_config(Path(), MEDIUM | {"engine.precision": "bf16"})
    return config, trace_of(config)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("ranks", "accumulation"), [(8, 1), (8, 4), (64, 2)])
def test_stages_1_and_2_need_what_the_zero_paper_says(
    whole: tuple[Config, Trace], stage: int, ranks: int, accumulation: int
):
    # arXiv 1910.02054, sections 5 and 7, with gradients in fp32 and an averaged teacher.
    config, traced = whole
    zero = config.engine.zero.model_copy(update={"stage": stage})
    batch = {"global_batch_size": 4 * ranks * accumulation, "max_micro_batch": 4}
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"zero": zero}),
            "optimizer": config.optimizer.model_copy(update=batch),
        }
    )
    plan = make_plan(config, traced, Cluster(gpu("h100"), 1, ranks))
    trained = sum(w.elements for w in traced.weights if w.trained)
    teacher = sum(w.elements for w in traced.weights if not w.trained)
    state = 2 * trained + 12 * trained / ranks + 2 * teacher + 4 * teacher / ranks
    assert sum(plan.state.values()) == pytest.approx(state, rel=0.01)
    gradients = 4 * trained / ranks + (4 * trained if (stage, accumulation > 1) == (1, True) else 0)
    assert plan.passing["gradients of a step"] == pytest.approx(gradients, rel=0.01)
    ring = (ranks - 1) / ranks
    reduced = 2 * ring * 4 * trained * (accumulation if stage == 2 else 1)
    gathered = ring * 2 * (trained + teacher)
    losses = sum(t.sent for t in plan.flow.traffic if "softmax" in t.name or "their" in t.name)
    sent = sum(t.sent for t in plan.flow.traffic)
    assert sent - losses == pytest.approx(reduced + gathered, rel=0.01)
    assert plan.flow.live == plan.waiting_parameters == 0


def test_mixed_sizes_need_the_memory_of_the_largest_and_the_mean_of_the_time():
    cluster = Cluster(gpu("h100"), 1, RANKS)

    def plan_at(**data: Any) -> Plan:
        changes = {f"data.{key}": value for key, value in data.items()}
        config = small_config(Path(), MEDIUM | {"engine.precision": "bf16"} | changes)
        return make_plan(config, trace_of(config), cluster, Assumptions(host=1e-9))

    small, large = plan_at(image_size=64), plan_at(image_size=128)
    mixed = plan_at(image_size=128, mixed_sizes=[{"size": 64, "weight": 3.0}, {"size": 128}])
    assert mixed.peak_memory == large.peak_memory
    assert large.flops.model > 3 * small.flops.model
    mean = (3 * small.flops.model + large.flops.model) / 4
    assert mixed.flops.model == pytest.approx(mean)
    assert mixed.step == pytest.approx((3 * small.step + large.step) / 4)
    task = Pretraining(mixed.config)  # type: ignore[arg-type]
    by_kind = {"64": small.flops.model, "128": large.flops.model}
    assert task.flops_by_kind() == pytest.approx(by_kind)
    assert task.flops() == pytest.approx(mean)
