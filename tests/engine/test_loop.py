"""Real processes: 1 and 2 ZeRO-3 ranks on gloo train the small network with the whole objective."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.small import small_config
from helpers.training import RandomStream, curve, full_weights, open_log, open_small, train_small
from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop, session
from m3i_scale.engine.stop import StopFlag
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.momentum import ema_coefficient
from m3i_scale.tasks.pretraining import CategoryError

pytestmark = pytest.mark.distributed


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Six steps on two ranks, two micro-batches a step, with drop-path."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_ranks(2, train_small, folder, overrides=DISTURBED, measured=True)[0]


DISTURBED = {
    "optimizer.max_micro_batch": 2,
    "model.backbone.options.drop_path_rate": 0.3,
    "model.backbone.options.drop_path_type": "uniform",
    "checkpoint.every": "2 steps",
    "checkpoint.keep_last": 9,
}


def test_trains_and_records_everything(undisturbed: tuple[Path, dict[str, Any]]):
    folder, result = undisturbed
    assert result["finished"]
    assert result["step"] == 6
    last = json.loads((folder / "small" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss/image_i", "loss/text_j", "accuracy/category_i", "spread/image_j",
                 "temperature/text_i", "balance/lambda", "gradient/ssp", "gradient/sp",
                 "teacher_momentum", "learning_rate", "images_per_second", "data_wait_seconds",
                 "machine/tflops_per_rank", "machine/slowest_rank_ratio",
                 "machine/memory_resident_gib"):  # fmt: skip
        assert math.isfinite(last[name]), name
    for name in ("config.yaml", "deepspeed.json", "origin.json"):
        assert (folder / "small" / name).stat().st_size > 0


def test_resumed_run_is_bitwise_the_undisturbed_one(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    folder, expected = undisturbed
    kept = folder / "small" / "checkpoints" / "step-00000002"
    result = run_ranks(2, train_small, tmp_path, overrides=DISTURBED, resume=str(kept))[0]
    assert same(result["weights"], expected["weights"])
    resumed, whole = curve(tmp_path), curve(folder)
    assert list(resumed) == [2, 3, 4, 5]
    assert resumed == {step: whole[step] for step in resumed}


def test_another_number_of_ranks_continues_the_same_batches(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    kept = undisturbed[0] / "small" / "checkpoints" / "step-00000002"
    two = undisturbed[1]
    # With the same samples in each softmax; drop-path is drawn by stream position.
    wider = DISTURBED | {"optimizer.max_micro_batch": 4}
    one = run_ranks(1, train_small, tmp_path / "one", overrides=wider, resume=str(kept))[0]
    # Adam makes a full step of the rounding noise of a bias without effect: compare by norm.
    a, b = (torch.cat([w.flatten() for w in r["weights"].values()]) for r in (one, two))
    assert (a - b).norm() < 1e-3 * b.norm()
    a, b = curve(tmp_path / "one"), curve(undisturbed[0])
    b = {step: b[step] for step in (2, 3, 4, 5)}
    assert list(a) == [2, 3, 4, 5]
    for step, value in b.items():
        assert a[step] == pytest.approx(value, rel=1e-5)


def one_step(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients in full and the balance's norms of the first step."""
    from deepspeed.utils import safe_get_full_grad

    run = open_small(world, folder, overrides)
    gradients: dict[str, torch.Tensor] = {}
    engine = run.sharded.engine
    original = engine.step

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in run.sharded.model.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = safe_get_full_grad(parameter).clone()
        original()

    engine.step = step
    record = open_log(run)
    loop.train_to_end(run, StopFlag(), record)
    record.close()
    return {"gradients": gradients}


def test_two_ranks_with_half_the_batch_give_the_loss_and_gradients_of_one(tmp_path: Path):
    single = {"optimizer.duration": "1 step", "optimizer.warmup": "0 steps"}
    one = run_ranks(1, one_step, tmp_path / "one", overrides=single)[0]["gradients"]
    two = run_ranks(2, one_step, tmp_path / "two", overrides=single)[0]["gradients"]
    for name in ("loss/total", "gradient/ssp", "gradient/sp"):
        (a,), (b,) = (curve(tmp_path / k, name).values() for k in ("one", "two"))
        assert a == pytest.approx(b, rel=1e-4), name
    largest = max(gradient.abs().max().item() for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(
            two[name], gradient, rtol=1e-3, atol=1e-6 * largest, msg=lambda m, name=name: name + m
        )


def momentum_trace(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Student weights after every step, and the teacher's at the end."""
    run = open_small(world, folder, overrides)
    assert run.sharded.teacher is not None
    start = full_weights(run)
    trace = []
    original = run.sharded.teacher.update

    def update(coefficient: float) -> None:
        trace.append(full_weights(run))
        original(coefficient)

    run.sharded.teacher.update = update  # type: ignore[method-assign]
    record = open_log(run)
    loop.train_to_end(run, StopFlag(), record)
    return {"start": start, "trace": trace, "end": full_weights(run)}


def momentum_traces(world: World, folder: Path, thresholds: list[int]) -> dict[int, Any]:
    """`momentum_trace` by persistence threshold."""
    return {
        threshold: momentum_trace(
            world,
            folder / str(threshold),
            {"engine.zero.persistence_threshold": threshold, "optimizer.teacher_momentum": 0.9},
        )
        for threshold in thresholds
    }


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("traces")
    return run_ranks(2, momentum_traces, folder, thresholds=THRESHOLDS)[1]


THRESHOLDS = [0, 100_000]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_momentum_shards_follow_a_dense_average(traces: dict[int, Any], threshold: int):
    result = traces[threshold]
    dense = {k: v for k, v in result["start"].items() if k.startswith("teacher.")}
    for name, value in dense.items():
        assert torch.equal(value, result["start"]["student." + name.removeprefix("teacher.")])
    for step, weights in enumerate(result["trace"]):
        coefficient = ema_coefficient(step, 6, 0.9, 1.0)
        dense = {
            name: value.lerp(weights["student." + name.removeprefix("teacher.")], 1 - coefficient)
            for name, value in dense.items()
        }
    assert all(torch.equal(dense[name], result["end"][name]) for name in dense)


def untrained(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    return full_weights(open_small(world, folder, overrides))


def test_initial_weights_depend_on_the_seed_only(tmp_path: Path):
    one = run_ranks(1, untrained, tmp_path / "one", overrides={})[0]
    two = run_ranks(2, untrained, tmp_path / "two", overrides={})[1]
    assert same(one, two)
    config = small_config(tmp_path, {})
    torch.manual_seed(config.seed)
    plain = dict(M3I(config.model, config.objective, config.data.image_size).named_parameters())
    student = [name for name in plain if not name.startswith("teacher.")]
    assert all(torch.equal(plain[name], one[name]) for name in student)


class PoisonedStream(RandomStream):
    """Crop boxes that are not a number at some positions, and so the loss."""

    def __init__(self, bad: range) -> None:
        self.bad = bad

    def loader(self, **options: Any):
        for batch in super().loader(**options):
            for row, position in enumerate(batch.position.tolist()):
                if position in self.bad:
                    batch.box_a[row] = float("nan")
            yield batch


def train_poisoned(
    world: World, folder: Path, overrides: dict[str, Any], bad: list[int]
) -> dict[str, Any]:
    run = open_small(world, folder, overrides)
    run.stream = PoisonedStream(range(*bad))
    record = open_log(run)
    message = ""
    try:
        loop.train_to_end(run, StopFlag(), record)
    except loop.UnstableError as error:
        message = str(error)
    return {"weights": full_weights(run), "skipped": run.progress.skipped, "message": message}


def test_a_step_with_a_non_finite_gradient_is_skipped_by_all_and_counted(tmp_path: Path):
    # Positions 16 to 23 are step 2; only rank 0's micro-batch is bad.
    result = run_ranks(2, train_poisoned, tmp_path, overrides={}, bad=[16, 18])[1]
    assert result["skipped"] == 1
    assert all(torch.isfinite(w).all() for w in result["weights"].values())
    losses = curve(tmp_path)
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [2]


def test_too_many_of_them_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path):
    overrides = {"engine.max_nonfinite_steps": 2, "checkpoint.every": "2 steps"}
    result = run_ranks(2, train_poisoned, tmp_path, overrides=overrides, bad=[24, 100])[0]
    assert "2 steps in a row" in result["message"]
    assert "step-00000002" in result["message"]


def train_through_poison(
    world: World, folder: Path, overrides: dict[str, Any], bad: list[int]
) -> dict[str, Any]:
    run = open_small(world, folder, overrides)
    run.stream = PoisonedStream(range(*bad))
    seen: list[int] = []
    original = run.stream.loader

    def loader(**options: Any):
        for batch in original(**options):
            seen.append(int(batch.position[0]))
            yield batch

    run.stream.loader = loader  # type: ignore[method-assign]
    record = open_log(run)
    finished = session.train_through(run, StopFlag(), record)
    return {"finished": finished, "seen": seen, "position": run.progress.position}


def test_an_unstable_run_goes_back_and_steps_over_the_data(tmp_path: Path):
    overrides = {
        "engine.max_nonfinite_steps": 1,
        "engine.rollbacks": 1,
        "checkpoint.every": "2 steps",
    }
    result = run_ranks(2, train_through_poison, tmp_path, overrides=overrides, bad=[24, 25])[0]
    assert result["finished"]
    # Step 3 (positions 24 to 31) is bad; back to the checkpoint of step 2, on from position 32.
    assert result["seen"] == [0, 8, 16, 24, 32, 40, 48, 56]
    assert result["position"] == 64


def test_a_spike_is_measured_against_the_average():
    mean = loop.RunningMean()
    assert [mean.ratio(2.0) for _ in range(20)] == pytest.approx([1.0] * 20)
    assert mean.ratio(6.0) == pytest.approx(3.0)
    assert mean.ratio(float("nan")) == 1.0


def meet_a_label_beyond_the_classifier(world: World, folder: Path) -> str:
    run = open_small(world, folder, {"model.categories": 2})
    batches = loop.open_batches(run)

    def train() -> None:
        for _ in range(6):
            loop.train_step(run, batches)

    with pytest.raises(CategoryError) as caught:
        train()
    return str(caught.value)


def test_a_label_that_no_index_announced_is_refused_with_its_sample(tmp_path: Path):
    said = run_ranks(1, meet_a_label_beyond_the_classifier, tmp_path)[0]
    assert said.startswith("sample ")
    assert "but model.categories is 2, for categories 0 to 1; set model.categories=" in said
