"""The teacher's two places, and state that is written where it lives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import run_ranks
from helpers.training import full_weights, open_small
from m3i_scale.cluster.launch import World
from m3i_scale.cluster.numerics import set_numerics
from m3i_scale.config import ConfigError
from m3i_scale.engine import loop, partitioned, shards
from m3i_scale.engine.zero import deepspeed_config

pytestmark = pytest.mark.distributed

BASE = {
    "optimizer.teacher_momentum": 0.5,
    "checkpoint.background": False,
    "engine.precision": "bf16",
}


def advance(run: loop.Run, steps: int) -> None:
    batches = loop.open_batches(run)
    for _ in range(steps):
        _, updated = loop.train_step(run, batches)
        assert updated
        run.progress.step += 1
        run.progress.position += run.split.batch


def train_and_save(
    world: World, folder: Path, overrides: dict[str, Any], resume: str, steps: int
) -> dict[str, Tensor]:
    run = open_small(world, folder, overrides, resume)
    advance(run, steps)
    loop.save(run)
    run.saver.finish()
    return full_weights(run)


def test_whole_and_sharded_continue_each_others_checkpoints_on_any_ranks(tmp_path: Path):
    whole, sharded = ({**BASE, "engine.teacher": kind} for kind in ("whole", "sharded"))
    folder = tmp_path / "one"
    run_ranks(2, train_and_save, folder, overrides=whole, resume="never", steps=2)
    ends = []
    for number, overrides in enumerate((whole, sharded)):
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        path = next((folder / "small" / "checkpoints").glob("step-*"))
        ends.append(
            run_ranks(2, train_and_save, copy, overrides=overrides, resume=str(path), steps=1)[0]
        )
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    moved = [n for n in ends[0] if n.startswith("teacher.")]
    assert any(
        not torch.equal(ends[0][n], ends[0]["student." + n.removeprefix("teacher.")]) for n in moved
    )
    one = run_ranks(1, read, tmp_path / "copy-0", overrides=sharded)[0]
    assert all(torch.equal(one[name], ends[0][name]) for name in ends[0])


def misaligned_weights(world: World, folder: Path, overrides: dict[str, Any]) -> list[str]:
    """Modules whose weights, as their forward pass sees them, begin at an odd place."""
    run = open_small(world, folder, overrides, "never")
    found: list[str] = []
    checked = 0

    def check(module: nn.Module, _: Any) -> None:
        nonlocal checked
        for name, parameter in module.named_parameters(recurse=False):
            checked += 1
            if parameter.data_ptr() % 16:
                found.append(f"{type(module).__name__}.{name} {tuple(parameter.shape)}")

    teacher = run.sharded.teacher
    assert teacher is not None
    for module in [*run.sharded.model.modules(), *teacher.teacher.modules()]:
        module.register_forward_pre_hook(check)
    advance(run, 2)
    assert checked > 100
    return found


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 3), (2, 1)])
def test_weights_begin_where_kernels_can_read_them(tmp_path: Path, ranks: int, stage: int):
    # On a GPU, cuDNN finds no algorithm for weights at odd places, and vectorised kernels fault.
    overrides = BASE | {"engine.zero.stage": stage}
    for found in run_ranks(ranks, misaligned_weights, tmp_path, overrides=overrides):
        assert found == []


def read(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Tensor]:
    return full_weights(open_small(world, folder, overrides, "auto"))


def resume_where_to_copies(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Resume while `Tensor.to` always gives a copy, as for states that are offloaded."""
    first = open_small(world, folder, overrides, "never")
    advance(first, 2)
    loop.save(first)
    first.saver.finish()
    original = torch.Tensor.to

    def copied(self: Tensor, *inputs: Any, **options: Any) -> Tensor:
        result = original(self, *inputs, **options)
        return result.clone() if result is self else result

    torch.Tensor.to = copied  # type: ignore[method-assign,assignment]
    try:
        second = open_small(world, folder, overrides | {"seed": 1}, accept=["seed"])
    finally:
        torch.Tensor.to = original  # type: ignore[method-assign]
    same = {}
    pairs = zip(
        shards.trained(first.sharded.model), shards.trained(second.sharded.model), strict=True
    )
    for (name, old), (_, new) in pairs:
        pairs_of_shards = [(first.sharded.shards, old), (second.sharded.shards, new)]
        for kind in (None, *shards.MOMENTS):
            one, two = (
                own.weight(parameter) if kind is None else own.moment(parameter, kind)
                for own, parameter in pairs_of_shards
            )
            same[f"{name} {kind}"] = torch.equal(one, two)
    weights = [full_weights(run) for run in (first, second)]
    same |= {name: torch.equal(weights[0][name], weights[1][name]) for name in weights[0]}
    return same


@pytest.mark.parametrize("stage", [3, 2])
def test_a_resume_writes_into_the_optimisers_own_storage(tmp_path: Path, stage: int):
    overrides = BASE | {"engine.zero.stage": stage}
    for same in run_ranks(2, resume_where_to_copies, tmp_path, overrides=overrides):
        assert len(same) > 100
        assert all(same.values()), [name for name, equal in same.items() if not equal]


class Partitioned:
    """A frozen parameter that ZeRO keeps gathered, with a node's copy (hpZ)."""

    def __init__(self) -> None:
        self.ds_status = type("Status", (), {"name": "AVAILABLE"})
        self.ds_secondary_tensor: Tensor | None = torch.zeros(2)

    def partition(self) -> None:
        self.ds_status = type("Status", (), {"name": "NOT_AVAILABLE"})
        if self.ds_secondary_tensor is None:
            self.ds_secondary_tensor = torch.zeros(2)  # DeepSpeed makes it from what is gathered


def test_no_copy_of_the_old_value_is_left_on_the_node():
    parameter = Partitioned()
    partitioned.forget_gathered(parameter)  # type: ignore[arg-type]
    assert parameter.ds_secondary_tensor is None
    assert parameter.ds_status.name == "NOT_AVAILABLE"


def test_states_on_nvme_are_refused(small_tree: dict[str, Any]):
    from m3i_scale.config import Config
    from m3i_scale.engine.schedules import split_batch

    small_tree["engine"]["zero"] = {
        "extra": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    }
    engine = Config.model_validate(small_tree).engine
    with pytest.raises(ConfigError, match=r"NVMe.*offload_optimizer=true"):
        deepspeed_config(engine, split_batch(8, 8, 1), clip_norm=1.0)


def test_determinism_is_switched_on_and_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "what the tests began with")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_numerics(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()  # the kernels ask for it, too
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_numerics(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
