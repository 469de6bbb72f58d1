"""Errors that nobody sees: each flipped bit is found, named, and ends the run; none is imagined."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers import bit_flips
from helpers.ranks import run_ranks
from helpers.training import open_small, train
from m3i_scale.cluster.launch import World
from m3i_scale.engine import checkpoint, loop
from m3i_scale.engine.checkpoint import CheckpointError, CheckpointReader
from m3i_scale.engine.checksums import additive, quick
from m3i_scale.engine.corruption import CORRUPTED, CorruptionError
from m3i_scale.engine.guard import Guard
from m3i_scale.engine.metrics import working_values
from m3i_scale.engine.state import restore

SMALL = {
    "optimizer.max_micro_batch": 4,
    "optimizer.duration": "1000 steps",
    "engine.verify.every": 1,
    "checkpoint.every": "1000 steps",
    "logging.pictures": False,
}


# ------------------------------------------------------------------------------------- checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_every_single_flipped_bit_changes_both_checksums(dtype: torch.dtype, count: int):
    tensor = torch.randn(count + 3).mul(3).to(dtype)[3:]  # begins at an odd place
    before = int(quick(tensor)), int(additive(tensor))
    for element in {0, count // 2, count - 1}:
        for bit in range(8 * tensor.element_size() - 1 if dtype != torch.bool else 1):
            bit_flips.flip(tensor, element, bit)
            assert int(quick(tensor)) != before[0], (element, bit)
            assert int(additive(tensor)) != before[1], (element, bit)
            bit_flips.flip(tensor, element, bit)
    assert (int(quick(tensor)), int(additive(tensor))) == before


def test_checksums_of_parts_add_up_to_that_of_the_whole():
    tensor = torch.randn(1003)
    whole = int(additive(tensor))
    for sizes in ([1003], [500, 503], [1, 1001, 1]):
        assert sum(int(additive(part)) for part in tensor.split(sizes)) == whole


def test_damaged_list_of_checksums_is_named_and_not_compared_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    weights = {"weight/a": torch.randn(9)}
    sums = {name: int(additive(tensor)) for name, tensor in weights.items()}
    write = checkpoint.begin_write(tmp_path, 1, 0, 1, weights, {"ranks": 1, "shapes": {}}, sums)
    write.thread.join()
    path = checkpoint.publish(write, 1)
    assert checkpoint.verify(path) is None
    reader = CheckpointReader.__new__(CheckpointReader)
    reader.path, reader.ranks = path, 1
    assert reader.sums(0, 1) == sums
    beside = path / "rank-00000-of-00001.json"
    text, value = beside.read_text(), str(sums["weight/a"])
    beside.write_text(text.replace(value, value[:-1] + str((int(value[-1]) + 1) % 10)))
    assert reader.sums(0, 1) is None
    assert "does not match its checksum" in caplog.text
    beside.write_text("{")
    assert reader.sums(0, 1) is None


def test_among_many_ranks_the_one_that_differs_is_named():
    guard = Guard.__new__(Guard)
    guard._kinds, guard._replicas = {"master weights": [], "weights": []}, {"weights"}
    reports = torch.zeros(4, 2, dtype=torch.float64)
    reports[:, 1] = 7.0
    assert guard.verdict(reports) == {}
    reports[0, 1], reports[2, 0] = 8.0, 0b101
    found = guard.verdict(reports)
    assert found[2] == ["master weights and buffers changed between two updates"]
    assert found[0][0].startswith("weights differ from those of rank 1: ")
    assert len(found) == 2


def test_slowest_device_and_what_it_costs():
    found = working_values(torch.tensor([1.0, 1.1, 3.0], dtype=torch.float64))
    assert found["machine/slowest_device_rank"] == 2
    assert found["machine/slowest_device_cost_seconds"] == pytest.approx(1.9)
    assert found["machine/slowest_device_ratio"] == pytest.approx(3 / 1.1)
    assert working_values(torch.tensor([1.0], dtype=torch.float64)) == {}
    assert working_values(torch.tensor([1.0, 0.0], dtype=torch.float64)) == {}  # not known yet


# ------------------------------------------------------------------------------- two ranks, a run


class Bench:
    """A run whose steps are made one by one."""

    def __init__(self, world: World, folder: Path, overrides: dict[str, Any]) -> None:
        self.world = world
        self.run = open_small(world, folder, SMALL | overrides, "never")
        self.batches = loop.open_batches(self.run)
        self.checks = loop.open_checks(self.run)

    def step(self) -> str:
        """A step; what was found wrong in it, for this once."""
        self.values, _ = loop.train_step(self.run, self.batches)
        self.run.progress.step += 1
        self.run.progress.position += self.run.split.batch
        problem, self.checks.problem = self.checks.problem, None
        guard = self.checks._guard
        assert guard is not None
        guard.forget()
        return "" if problem is None else str(problem)

    @property
    def here(self) -> bool:
        """Whether errors are made on this rank: on the last one only."""
        return self.world.rank == self.world.size - 1


def flips(world: World, folder: Path, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every kind of error under every setting: what is said of it."""
    found: dict[str, Any] = {}
    for name, overrides in settings.items():
        bench = Bench(world, folder / name, overrides)
        said = {"nothing": [bench.step() for _ in range(2)]}
        said |= in_the_state(bench) | in_the_step(bench)
        said["nothing at last"] = [bench.step()]
        said |= in_checkpoints(bench)
        found[name] = said
    found["straggler"] = straggler(bench)
    found["run"] = in_a_run(bench)
    return found


def straggler(bench: Bench) -> list[float]:
    """One rank is late within the step: who is named, and what it cost."""
    module = bench.run.sharded.model.student.backbone.patch_embed
    handle = module.register_forward_hook(lambda *_: time.sleep(1.5) if bench.here else None)
    bench.step()
    handle.remove()
    names = ("rank", "cost_seconds", "seconds")
    return [bench.values[f"machine/slowest_device_{name}"] for name in names]


def in_a_run(bench: Bench) -> dict[str, Any]:
    """Train on, with a checkpoint every other step; a moment changes before the fourth update."""
    run = bench.run
    first = run.progress.step = 2 * (run.progress.step // 2)
    run.save_every, run.saver.damaged = 2, 0

    def change() -> None:
        if bench.here:
            bit_flips.flip(bit_flips.storages(run)["exp_avg_sq"])

    with bit_flips.in_pass(8, change):  # two passes a step
        try:
            train(run)
        except CorruptionError as error:
            lines = (run.folder / "metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])
            return {
                "words": str(error),
                "code": error.exit_code,
                "nodes": len(error.nodes),
                "steps": [run.progress.step - first, last["step"] - first],
                "errors": last["verify/errors"],
                "last good": checkpoint.step_of(run.saver.last_good) - first,
                "damaged": checkpoint.verify(run.saver.last_good),
                "slowest": last["machine/slowest_device_rank"],
            }
    return {}


def in_the_state(bench: Bench) -> dict[str, Any]:
    """A bit of each kind between two updates; what the others are made of is changed apart."""
    tensors = bit_flips.storages(bench.run)
    apart = {"weights", "teacher's weights"} & tensors.keys()
    said: dict[str, Any] = {"kinds": sorted(tensors)}
    for name, kinds in (("kept", tensors.keys() - apart), ("made", apart)):

        def change(kinds: set[str] = kinds) -> None:
            for kind in kinds if bench.here else ():
                bit_flips.flip(tensors[kind], tensors[kind].numel() // 2)

        with bit_flips.in_pass(2, change):  # after the last pass
            said[name] = bench.step()
    bench.step()  # ranks are alike again after the next update
    alike = next((kind for kind in ("teacher's weights", "weights") if kind in apart), "")
    if alike in bench.checks._guard._replicas:
        accept = loop.Checks.accept

        def gather_wrongly(self: Any) -> None:
            if bench.here:
                bit_flips.flip(tensors[alike], 5)
            accept(self)

        with mock.patch.object(loop.Checks, "accept", gather_wrongly):
            bench.step()
        said["alike"] = bench.step()
        bench.step()
    return said


def in_the_step(bench: Bench) -> dict[str, str]:
    """A bit of what is computed, in the second pass."""
    run, said = bench.run, {}

    def change(tensor: Tensor) -> None:
        if bench.here:
            bit_flips.flip(tensor)

    with bit_flips.in_pass(2, lambda: change(bit_flips.gradient(run))):
        said["gradient"] = bench.step()
    module = run.sharded.model.student.backbone.patch_embed
    calls = run.split.accumulation * (2 if run.task.looks_first(run.split.accumulation) else 1)
    wrong = bit_flips.in_output_of(module, calls + 1) if bench.here else contextlib.nullcontext()
    with wrong:  # at the beginning of the second pass
        said["computation"] = bench.step()
    name = "reduce_scatter_single" if run.config.engine.zero.stage == 3 else "all_reduce"
    name = name if hasattr(torch.distributed, name) else "reduce_scatter_tensor"
    collective = bit_flips.in_collective(name, 1, 500) if bench.here else contextlib.nullcontext()
    with collective:
        said["collective"] = bench.step()
    held: list[Any] = []
    original = loop.Passes.hold

    def hold(self: Any, batches: Any) -> Any:
        held[:] = original(self, batches)
        return held

    with (
        mock.patch.object(loop.Passes, "hold", hold),
        bit_flips.in_pass(1, lambda: change(held[0].view_a)),
    ):
        said["batch"] = bench.step()
    return said


def in_checkpoints(bench: Bench) -> dict[str, Any]:
    """A bit of the copy in memory, and of what is read."""
    run, save_file = bench.run, checkpoint.save_file
    loop.save(run)
    good = run.saver.finish()
    first = run.saver.last_good

    def spoil(tensors: dict[str, Tensor], path: Path) -> None:
        if bench.here:
            bit_flips.flip(max(tensors.values(), key=torch.numel), 3)
        save_file(tensors, path)

    run.progress.step += 1
    with mock.patch.object(checkpoint, "save_file", spoil):
        loop.save(run)
        bad = run.saver.finish()
    said: dict[str, Any] = {
        "checkpoints": [good, bad, run.saver.damaged, run.saver.last_good == first]
    }
    assert first is not None
    reader, read = CheckpointReader(first), CheckpointReader.slice
    restore(reader, run.sharded, run.world, run.task)  # as it is

    def misread(self: CheckpointReader, kind: str, *place: Any) -> Tensor:
        part = read(self, kind, *place).clone()
        if bench.here and kind == "exp_avg" and part.numel():
            bit_flips.flip(part)
        return part

    with mock.patch.object(CheckpointReader, "slice", misread):
        try:
            restore(reader, run.sharded, run.world, run.task)
        except CheckpointError as error:
            said["load"] = str(error)
    restore(reader, run.sharded, run.world, run.task)
    bench.checks.accept()
    if bench.here:
        bit_flips.flip(bit_flips.storages(run)["exp_avg"])
    try:
        loop.save(run)
    except CorruptionError as error:
        said["save"] = str(error)
    return said


SETTINGS: dict[str, dict[str, Any]] = {
    "3": {"engine.zero.stage": 3, "optimizer.max_micro_batch": 2},
    "2": {"engine.zero.stage": 2},
    "1, batch negatives": {
        "engine.zero.stage": 1,
        "objective.negatives": "batch",
        "optimizer.max_micro_batch": 2,
    },
    "3, sharded teacher": {"engine.teacher": "sharded", "engine.precision": "fp32"},
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks says of every error, under every setting; rank 1 makes them."""
    folder = tmp_path_factory.mktemp("flips")
    return run_ranks(2, flips, folder, settings=SETTINGS, time_limit=500)


@pytest.fixture(params=SETTINGS)
def words(said: list[dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """Under one setting; both ranks say the same."""
    one, two = (rank[request.param] for rank in said)
    assert one.keys() == two.keys()
    assert [one[k] for k in one if k != "load"] == [two[k] for k in two if k != "load"]
    return one


@pytest.mark.distributed
def test_nothing_is_found_where_nothing_is_wrong(words: dict[str, Any]):
    assert words["nothing"] == ["", ""]
    assert words["nothing at last"] == [""]


@pytest.mark.distributed
def test_state_that_changes_between_two_updates_is_found_on_its_rank(words: dict[str, Any]):
    kinds = set(words["kinds"])
    assert kinds >= {"master weights", "exp_avg", "exp_avg_sq", "weights", "averages"}
    made = {"weights", "teacher's weights"} & kinds
    for name, expected in (("kept", kinds - made), ("made", made)):
        assert words[name].startswith("rank 1 ("), words[name]
        assert "changed between two updates" in words[name]
        assert "rank 0 (" not in words[name]
        for kind in expected:  # in fp32 there is one copy of both kinds of weights
            assert kind in words[name] or "master weights" in words[name], (kind, words[name])


@pytest.mark.distributed
def test_ranks_that_should_be_alike_and_are_not_are_found(words: dict[str, Any]):
    if "teacher's weights" in words["kinds"]:
        assert "rank 1 (" in words["alike"]
        assert "differ from those of rank 0" in words["alike"]
        assert "a collective gave another result" in words["alike"]
    else:  # everything is sharded
        assert "alike" not in words


@pytest.mark.distributed
def test_straggler_inside_a_step_is_named_with_its_cost(said: list[dict[str, Any]]):
    rank, cost, seconds = said[0]["straggler"]
    assert rank == 1
    assert 0 < cost < seconds
    assert seconds > 2 * 1.5  # two passes


@pytest.mark.distributed
def test_wrong_results_in_a_step_are_found_and_the_rank_is_named(words: dict[str, Any]):
    assert "; rank 0" not in words["gradient"] + words["computation"] + words["batch"]
    assert "rank 1" in words["gradient"]
    assert "the gradient of " in words["gradient"]
    assert "differs by up to " in words["gradient"]
    assert "rank 1" in words["computation"]
    assert "data after" not in words["computation"]
    assert "rank 1" in words["batch"]
    assert "the batch changed in host memory" in words["batch"]


@pytest.mark.distributed
def test_wrong_result_of_a_collective_is_told_from_a_wrong_computation(words: dict[str, Any]):
    assert "rank 1" in words["collective"]
    assert "data after " in words["collective"]
    assert "rank 0" not in words["collective"]


@pytest.mark.distributed
def test_copy_of_a_checkpoint_that_changes_in_memory_does_not_count(words: dict[str, Any]):
    assert words["checkpoints"] == [True, False, 1, True]


@pytest.mark.distributed
def test_state_that_changes_before_it_is_saved_is_not_saved(words: dict[str, Any]):
    assert "rank 1" in words["save"]
    assert "exp_avg changed between two updates" in words["save"]


@pytest.mark.distributed
def test_what_is_loaded_is_what_was_saved(words: dict[str, Any]):
    assert "arrived in memory with other bits than were saved: exp_avg/" in words["load"]


@pytest.mark.distributed
def test_run_ends_with_the_last_good_checkpoint_and_names_the_node(said: list[dict[str, Any]]):
    found = said[0]["run"]
    assert "rank 1" in found["words"]
    assert "exp_avg_sq changed between two updates" in found["words"]
    assert "last good checkpoint is" in found["words"]
    assert found["steps"] == [3, 3]
    assert (found["code"], found["nodes"]) == (CORRUPTED, 1)
    assert (found["last good"], found["damaged"], found["errors"]) == (2, None, 1)
    assert found["slowest"] in (0, 1)
