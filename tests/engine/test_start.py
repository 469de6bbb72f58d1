"""The start of a run: centres in checkpoints, the bound of the temperature, what is warned of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.small import small_targets
from helpers.training import full_weights, open_small, train_and_resume
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine import loop
from m3i_scale.models.heads import Temperature
from m3i_scale.objective.m3i import M3I
from m3i_scale.tasks.health import Health


def running_centres() -> list[dict[str, Any]]:
    """The small configuration's targets, images centred by averages."""
    return [
        t | ({"centre": "running"} if t["representation"] == "features" else {})
        for t in small_targets()
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_running_centres_are_equal_on_all_ranks_and_continue_exactly(
    tmp_path: Path, precision: str
):
    overrides = {
        "optimizer.max_micro_batch": 2,
        "objective.targets": running_centres(),
        "engine.precision": precision,
    }
    first, second = run_ranks(2, train_and_resume, tmp_path, overrides=overrides)
    for name in ("image_i", "image_j"):
        averages = first["whole"]["centres"][name]
        assert averages.dtype == torch.float32
        assert averages[-1].item() == pytest.approx(1 - 0.9**8)  # two micro-steps a step
        assert torch.equal(averages, second["whole"]["centres"][name])
        assert torch.equal(averages, first["resumed"]["centres"][name])
    weights, again = (first[k]["weights"] for k in ("whole", "resumed"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert 0.9 < first["whole"]["start_rank"] == first["resumed"]["start_rank"]


def step_from_above(world: World, folder: Path, overrides: dict[str, Any]) -> list[float]:
    """Of a step that starts above the bound: tau in it, weight and master after it, tau after."""
    run = open_small(world, folder, overrides, "never")
    ((parameter, maximum),) = run.sharded.model.upper_bounds()
    shards = run.sharded.shards
    with torch.no_grad():
        shards.weight(parameter).fill_(maximum + 0.5)
    shards.publish()
    batches = loop.open_batches(run)
    first, _ = loop.train_step(run, batches)
    name = "temperatures.text.log_scale"
    whole = full_weights(run)[name].item()
    (master,) = shards.weight(parameter).tolist() or [maximum]  # one element, on one rank
    second, _ = loop.train_step(run, batches)
    return [first["temperature/text_i"], whole, master, second["temperature/text_i"]]


def steps_from_above(
    world: World, folder: Path, precisions: list[str], stage: int
) -> dict[str, list[float]]:
    """`step_from_above` by precision."""
    return {
        precision: step_from_above(
            world,
            folder / precision,
            {
                "engine.precision": precision,
                "engine.zero.persistence_threshold": 500,
                "engine.zero.stage": stage,
            },
        )
        for precision in precisions
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "precisions", "stage"),
    [(1, ["fp32"], 3), (2, ["fp32", "bf16"], 3), (2, ["bf16"], 1)],
)
def test_a_temperature_beyond_its_bound_is_there_after_the_step(
    tmp_path: Path, ranks: int, precisions: list[str], stage: int
):
    bound = math.log(100)
    results = run_ranks(ranks, steps_from_above, tmp_path, precisions=precisions, stage=stage)
    for precision, (before, whole, master, after) in (p for r in results for p in r.items()):
        exact = precision == "fp32"
        assert before < 0.0075  # the bound is no part of the forward pass
        assert whole == pytest.approx(bound, abs=1e-6 if exact else 0.02)
        assert after == pytest.approx(0.01, rel=1e-4 if exact else 0.02)
        assert master <= bound + 1e-6


def test_a_temperature_at_its_bound_returns(small: Config):
    model = M3I(small.model, small.objective, small.data.image_size)
    ((parameter, maximum),) = model.upper_bounds()
    part = model.temperatures["text"]
    assert isinstance(part, Temperature)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0)

    def step(sign: float) -> float:
        optimizer.zero_grad()
        (sign * part(torch.ones(1))).sum().backward()
        optimizer.step()
        with torch.no_grad():
            parameter.clamp_(max=maximum)
        return parameter.item()

    up = [step(-1.0) for _ in range(60)]
    assert up[-1] == pytest.approx(math.log(100))
    assert 1 / part(torch.ones(1)).item() == pytest.approx(0.01)
    down = [step(1.0) for _ in range(60)]
    assert down[-1] < math.log(100) - 1


def test_a_collapsing_encoder_is_named_once_and_only_where_it_collapses():
    def said(ranks: list[float], health: Health, first: int = 0) -> list[str]:
        found = []
        for step, rank in enumerate(ranks, first):
            found += health.warnings({"student/rank": rank, "balance/lambda": 1.0}, step)
        return found

    assert not said([3.0, 1.0, 3.0, 1.0, 2.0, *[1.1] * 40], Health())
    health = Health()
    (sentence,) = said([2.5] * 5 + [1.14] * 40, health)
    assert "1.2" in sentence
    assert "2.50" in sentence
    assert health.start_rank == pytest.approx(2.5)
    # A resumed run remembers its start.
    again = Health()
    again.start_rank = 2.5
    assert len(said([1.1] * 20, again, first=30)) == 1
    assert not said([float("nan")] * 20, Health())


def test_a_lambda_out_of_proportion_is_named_once():
    health = Health()
    found = []
    for step, weight in enumerate((1.0, 49.0, 51.0, 300.0)):
        found += health.warnings({"balance/lambda": weight}, step)
    (sentence,) = found
    assert "51" in sentence
    assert "balance.maximum" in sentence
