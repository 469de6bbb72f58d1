"""Coalesced collectives, blocks as leaves and a whole teacher against DeepSpeed's own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import full_weights, open_small
from ranks import run_ranks

from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop, quick
from m3i_scale.objective.m3i import M3I

pytestmark = pytest.mark.distributed

SIZES = [(3, 5), (8,), (1,), (2, 3, 4), (7, 7)]


def compare_reduce_scatter(world: World, folder: Path) -> list[bool]:
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced as theirs

    from m3i_scale.engine.coalesced import reduce_scatter_coalesced as ours

    generator = torch.Generator().manual_seed(world.rank)
    same = []
    for sizes in (SIZES, SIZES[:1], [(6, world.size)]):
        tensors = [torch.randn(size, generator=generator) for size in sizes]
        pairs = zip(ours([t.clone() for t in tensors]), theirs(tensors), strict=True)
        same += [torch.equal(a, b) for a, b in pairs]
    return same


@pytest.mark.parametrize("ranks", [1, 3])
def test_shards_of_averaged_gradients_are_deepspeeds(tmp_path: Path, ranks: int):
    for result in run_ranks(ranks, compare_reduce_scatter, tmp_path):
        assert len(result) == len(SIZES) + 2
        assert all(result)


def train(
    world: World, folder: Path, overrides: dict[str, Any], deepspeeds_way: bool
) -> dict[str, Any]:
    """Three steps; `deepspeeds_way` with its own collectives, and every layer by itself."""
    if deepspeeds_way:
        quick.prepare = lambda: None
        M3I.blocks_run_once = lambda self: []  # type: ignore[method-assign]
    run = open_small(world, folder, overrides, "never")
    batches = loop.open_batches(run)
    values = {}
    for _ in range(3):
        values, updated = loop.train_step(run, batches)
        assert updated
        run.progress.step += 1
        run.progress.position += run.split.batch
    return {"weights": full_weights(run), "norm": values["gradient/all_parameters"]}


CASES: dict[str, dict[str, Any]] = {
    "checkpointed": {
        "model.backbone.options.checkpoint_blocks": True,
        "model.text.checkpoint_blocks": True,
        "model.decoder.checkpoint_blocks": True,
        "engine.zero.persistence_threshold": 100,
    },
    "accumulated": {"optimizer.max_micro_batch": 2, "engine.zero.persistence_threshold": 1000},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_deepspeeds_own_way_bit_for_bit(tmp_path: Path, case: str):
    base = CASES[case] | {"optimizer.teacher_momentum": 0.9}
    before = run_ranks(
        2,
        train,
        tmp_path / "before",
        overrides=base | {"engine.teacher": "sharded"},
        deepspeeds_way=True,
    )[0]
    for teacher in ("whole", "sharded"):
        now = run_ranks(
            2,
            train,
            tmp_path / teacher,
            overrides=base | {"engine.teacher": teacher},
            deepspeeds_way=False,
        )[1]
        assert now["norm"] == before["norm"]
        assert now["weights"].keys() == before["weights"].keys()
        differing = [
            n for n, w in before["weights"].items() if not torch.equal(w, now["weights"][n])
        ]
        assert not differing
