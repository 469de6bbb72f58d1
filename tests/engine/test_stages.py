"""ZeRO's stages: the same training, and each goes on from the others' checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from helpers.training import RandomStream, full_weights, open_small
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config, ConfigError
from m3i_scale.engine import loop
from m3i_scale.engine.schedules import split_batch
from m3i_scale.engine.state import snapshot
from m3i_scale.engine.zero import deepspeed_config

BASE = {
    "optimizer.teacher_momentum": 0.5,
    "optimizer.max_micro_batch": 2,  # two micro-steps on two ranks
    "engine.zero.reduce_bucket": 20_000,  # several in a step, and less than one weight
    "checkpoint.background": False,
}
States = dict[str, Tensor]


class PoisonedStream(RandomStream):
    """Crop boxes of rank 0 that are not a number, and so the loss."""

    def loader(self, **options: Any):
        for batch in super().loader(**options):
            if options["rank"] == 0:
                batch.box_a[0] = float("nan")
            yield batch


def states(run: loop.Run) -> States:
    """This rank's slices of weights, moments and averages, as a checkpoint holds them."""
    tensors, _ = snapshot(run.sharded, run.world, run.progress, run.task)
    return {name: value for name, value in tensors.items() if not name.startswith("rng/")}


def advance(run: loop.Run, steps: int, *, updated: bool = True) -> States:
    batches = loop.open_batches(run)
    for _ in range(steps):
        assert loop.train_step(run, batches)[1] == updated
        run.progress.step += 1
        run.progress.position += run.split.batch
    return states(run)


def saved(run: loop.Run) -> str:
    loop.save(run)
    assert run.saver.finish()
    return str(run.saver.last_good)


def equal(one: States, two: States) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def distance(one: States, two: States, start: States) -> float:
    """Of the weights, as a share of their way from the start."""
    names = [name for name in two if name.startswith("weight/")]
    apart, way = (
        sum(float((a[n] - b[n]).double().square().sum()) for n in names) ** 0.5
        for a, b in ((one, two), (two, start))
    )
    return apart / way


class Case:
    """Runs of one precision in one folder."""

    def __init__(self, world: World, folder: Path, precision: str) -> None:
        self._world, self._folder = world, folder / precision
        self._base = BASE | {"engine.precision": precision}

    def open(self, name: str, stage: int, resume: str = "never") -> loop.Run:
        overrides = self._base | {"engine.zero.stage": stage}
        return open_small(self._world, self._folder / name, overrides, resume)


def compare_stages(
    world: World, folder: Path, precision: str, stages: list[int]
) -> dict[str, dict[str, Any]]:
    """Stage 3 and others, all in one group of processes."""
    case = Case(world, folder, precision)
    run = case.open("3", 3)
    reference = {"start": states(run), "middle": advance(run, 2), "path": saved(run)}
    reference["weights"] = full_weights(run)
    reference["end"] = advance(run, 2)
    found: dict[str, dict[str, Any]] = {"3": reference}
    for stage in stages:
        found[str(stage)] = {
            "alone": alone(case, stage, reference),
            "mixed": mixed(case, stage, reference),
        }
    return found


def alone(case: Case, stage: int, reference: dict[str, Any]) -> dict[str, Any]:
    """From the beginning; from a checkpoint of the same stage; through a step that is skipped."""
    start, middle, end = (reference[name] for name in ("start", "middle", "end"))
    run = case.open(str(stage), stage)
    same = {"initial states": equal(states(run), start)}
    own_middle, _ = advance(run, 2), saved(run)
    own_end = advance(run, 2)
    again = case.open(str(stage), stage, "auto")
    same["states after a resume"] = equal(states(again), own_middle)
    same["steps after a resume"] = equal(advance(again, 2), own_end)
    # A step with a gradient that is not finite leaves no trace, in the next step neither.
    clean, again.stream = again.stream, PoisonedStream()
    same["states after a skipped step"] = equal(advance(again, 1, updated=False), own_end)
    again.stream = clean
    again.progress.step, again.progress.position = run.progress.step, run.progress.position
    same["the step after it"] = equal(advance(again, 1), advance(run, 1))
    apart = [distance(own_middle, middle, start), distance(own_end, end, start)]
    return {"same": same, "distances": apart}


def mixed(case: Case, stage: int, reference: dict[str, Any]) -> dict[str, Any]:
    """On from stage 3's checkpoint, and back."""
    middle, weights = reference["middle"], reference["weights"]
    run = case.open(f"from 3 to {stage}", stage, reference["path"])
    same = {"states": equal(states(run), middle), "weights": equal(full_weights(run), weights)}
    back = case.open(f"from 3 to {stage} to 3", 3, saved(run))
    same["states back at stage 3"] = equal(states(back), middle)
    same["weights back at stage 3"] = equal(full_weights(back), weights)
    later, path = advance(run, 1), saved(run)
    apart = [distance(advance(run, 1), reference["end"], reference["start"])]
    return {"same": same, "distances": apart, "later": later, "path": path}


def go_on_alone(world: World, folder: Path, stage: int, path: str) -> dict[str, States]:
    """On one rank, with micro-batches of the same samples: as it was read, and a step later."""
    overrides = BASE | {"engine.zero.stage": stage, "optimizer.max_micro_batch": 4}
    run = open_small(world, folder, overrides, path)
    return {"read": states(run), "end": advance(run, 1)}


# In bf16 autograd's order of additions tells, and Adam's first steps are little more than the
# gradients' signs.
BOUNDS = {"fp32": 2e-3, "bf16": 0.1}


def require_same(ranks: list[dict[str, Any]], precision: str, stages: list[int]) -> None:
    for found in ranks:
        for stage in stages:
            for way, seen in found[str(stage)].items():
                wrong = [what for what, same in seen["same"].items() if not same]
                assert not wrong, (stage, way)
                assert max(seen["distances"]) < BOUNDS[precision], (stage, way)


@pytest.mark.distributed
def test_stages_train_the_same_in_bf16(tmp_path: Path):
    stages = [1, 2]
    ranks = run_ranks(2, compare_stages, tmp_path, time_limit=500, precision="bf16", stages=stages)
    require_same(ranks, "bf16", stages)


@pytest.mark.distributed
def test_a_run_goes_through_all_stages_and_from_two_ranks_to_one(tmp_path: Path):
    ranks = run_ranks(2, compare_stages, tmp_path, time_limit=500, precision="fp32", stages=[1])
    require_same(ranks, "fp32", [1])
    # Two ranks at stage 3, two at stage 1, one at stage 2, whose slices are the whole tensors.
    chain = [found["1"]["mixed"] for found in ranks]
    (one,) = run_ranks(1, go_on_alone, tmp_path / "one", stage=2, path=chain[0]["path"])
    assert equal(one["read"], joined([seen["later"] for seen in chain]))
    start, end = (joined([found["3"][name] for found in ranks]) for name in ("start", "end"))
    assert distance(one["end"], end, start) < BOUNDS["fp32"]


def joined(slices: list[States]) -> States:
    """The whole tensors, flat, of all ranks' slices."""
    return {name: torch.cat([one[name].flatten() for one in slices]) for name in slices[0]}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"teacher": "sharded", "zero": {"stage": 1}},
            r"sharded needs zero.stage 3.*teacher: whole",
        ),
        ({"zero": {"stage": 2, "hpz_partition": 8}}, r"hpz_partition 8 needs stage 3.*remove it"),
        ({"zero": {"stage": 1, "offload_optimizer": True}}, r"offload_optimizer needs stage 3"),
    ],
)
def test_what_needs_stage_3_is_refused_elsewhere(
    small_tree: dict[str, Any], engine: dict[str, Any], message: str
):
    small_tree["engine"] |= engine
    with pytest.raises(ValueError, match=message):
        Config.model_validate(small_tree)


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        (3, {"stage": 2}, r"extra says stage 2.*set engine\.zero\.stage"),
        (1, {"offload_optimizer": {"device": "cpu"}}, r"needs stage 3.*engine\.zero\.stage=3"),
    ],
)
def test_a_stage_in_extra_is_refused(
    small_tree: dict[str, Any], stage: int, section: dict[str, Any], message: str
):
    small_tree["engine"]["zero"] = {"stage": stage, "extra": {"zero_optimization": section}}
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(
            Config.model_validate(small_tree).engine, split_batch(8, 8, 1), clip_norm=1.0
        )


OPEN = """
import sys
from pathlib import Path
import torch
from m3i_scale.cluster import launch
world = launch.start("cpu", "fp32", 0, 1.0)
from helpers.small import small_config
from helpers.training import RandomStream
from m3i_scale.engine import session
from m3i_scale.tasks.pretraining import Pretraining
config = small_config(Path(sys.argv[1]), {"engine.zero.stage": int(sys.argv[2])})
session.open_run(Pretraining(config), world, RandomStream(config), epoch_samples=64, resume="never")
with torch.device("meta"):
    found = [torch.nn.Linear(2, 2).weight, torch.zeros(2), torch.ones(2), torch.full((2,), 3.0)]
print("on", *(tensor.device for tensor in found))
launch.finish()
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_networks_can_be_built_without_memory_after_those_of_a_run(stage: int, tmp_path: Path):
    # In a process of its own: PyTorch lists the functions that follow a device once.
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path), str(stage)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert "on meta meta meta meta" in done.stdout, done.stdout + done.stderr
