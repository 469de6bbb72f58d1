"""Coalesced collectives, blocks as leaves and a whole teacher against DeepSpeed's own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training import full_weights, open_small
from m3i_scale.cluster.launch import World
from m3i_scale.engine import linear, loop, quick
from m3i_scale.objective.m3i import M3I

pytestmark = pytest.mark.distributed

SIZES = [(3, 5), (8,), (1,), (2, 3, 4), (7, 7)]


def compare_collectives(world: World, folder: Path) -> list[bool]:
    """Of shards of averaged gradients, then of their norm: ours and DeepSpeed's, bit for bit."""
    return compare_reduce_scatter(world) + compare_norms(world)


def compare_norms(world: World) -> list[bool]:
    """In half and single precision, of a gradient without elements, and of one with an infinity."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Theirs

    owner = mock.Mock(device="cpu")
    owner._get_param_partition_group.return_value = None
    owner._autoep_expert_parallel_group.return_value = None
    generator = torch.Generator().manual_seed(world.rank)
    same = []
    for dtype, more in ((torch.float32, [0.0]), (torch.bfloat16, []), (torch.float32, [torch.inf])):
        tensors = [torch.randn(size, generator=generator).to(dtype) for size in (*SIZES, (300,))]
        tensors.append(torch.tensor(more, dtype=dtype))
        found = quick.group_norm(tensors, None)
        expected = Theirs.get_grad_norm_direct(owner, tensors, tensors)
        same.append(torch.equal(found, expected) and found.dtype == expected.dtype)
        same.append(bool(found > 1) != (torch.inf in more))
    return same


def compare_reduce_scatter(world: World) -> list[bool]:
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
def test_shards_of_averaged_gradients_and_their_norm_are_deepspeeds(tmp_path: Path, ranks: int):
    for result in run_ranks(ranks, compare_collectives, tmp_path):
        assert len(result) == len(SIZES) + 2 + 6
        assert all(result)


# Name, place of the teacher, and whether blocks are leaves: gathered and reduced at once.
WAYS = (("before", "sharded", False), ("whole", "whole", False), ("leaves", "sharded", True))


def train_in_all_ways(
    world: World, folder: Path, overrides: dict[str, Any]
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """All weights after each of three steps, by way.

    `before` is DeepSpeed's own, with its collectives and functions. It comes first: once
    `quick.prepare` has replaced them, they stay replaced in the process.
    """
    from deepspeed.runtime.zero import partition_parameters

    assert partition_parameters.zero3_linear_wrap is not linear.linear, "replaced already"
    prepare, blocks_run_once = quick.prepare, M3I.blocks_run_once
    found = {}
    for way, teacher, leaves in WAYS:
        quick.prepare = (lambda: None) if way == "before" else prepare
        M3I.blocks_run_once = blocks_run_once if leaves else lambda self: []  # type: ignore[method-assign]
        found[way] = train(world, folder / way, overrides | {"engine.teacher": teacher})
    return found


def train(world: World, folder: Path, overrides: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """All weights after each of three steps."""
    run = open_small(world, folder, overrides, "never")
    batches = loop.open_batches(run)
    weights = []
    for _ in range(3):
        _, updated = loop.train_step(run, batches)
        assert updated
        weights.append(full_weights(run))
        run.progress.step += 1
        run.progress.position += run.split.batch
    return weights


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    """Names whose weights differ in any bit."""
    assert one.keys() == two.keys()
    return {name for name, weight in one.items() if not torch.equal(weight, two[name])}


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
def test_weights_are_those_of_deepspeeds_own_way(tmp_path: Path, case: str):
    overrides = CASES[case] | {"optimizer.teacher_momentum": 0.9}
    runs = run_ranks(2, train_in_all_ways, tmp_path, overrides=overrides)[1]
    for before, whole in zip(runs["before"], runs["whole"], strict=True):
        assert not differing(before, whole)
    # BERT's layers read their input four times; without DeepSpeed's hooks between them autograd
    # adds the four gradients in another order, which only what lies before the first layer sees.
    first, leaf = runs["before"][0], runs["leaves"][0]
    rounded = differing(first, leaf)
    assert all("text_tower.bert.embeddings." in name for name in rounded)
    for name in rounded:
        torch.testing.assert_close(leaf[name], first[name], rtol=1e-3, atol=1e-5)
