"""kill -9, full disks and impatient signals: what is started again ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.ranks import run_ranks, start_ranks, wait_all
from helpers.small import small_targets
from helpers.training import curve, open_log, open_small, train_small
from m3i_scale.cluster.launch import World
from m3i_scale.engine import checkpoint, loop
from m3i_scale.engine.checkpoint import CheckpointError, complete_checkpoints, rank_file
from m3i_scale.engine.stop import StopFlag

pytestmark = pytest.mark.distributed

EVERY_STEP = {
    "model.backbone.options.drop_path_rate": 0.2,
    "optimizer.duration": "8 steps",
    "optimizer.max_micro_batch": 2,
    "checkpoint.every": "1 step",
    "checkpoint.keep_last": 2,
}


def checkpoints(folder: Path) -> list[Path]:
    return complete_checkpoints(folder / "small" / "checkpoints")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint: weights, moments, averages, generators' states."""
    assert checkpoint.verify(checkpoints(folder)[-1]) is None
    return {
        f"{path.name}: {name}": tensor
        for path in checkpoints(folder)[-1].glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_end(folder: Path, other: Path) -> None:
    a, b = saved(folder), saved(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert curve(folder) == curve(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_small, folder, overrides=EVERY_STEP)
    return folder


# ------------------------------------------------------------------------------ at chosen moments


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(name: str, which: int) -> None:
    """Have this process die in writing the `which`-th file of that name, half of it written."""
    left = [which]

    def cutting(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            write(*arguments)
            path = next(argument for argument in arguments if isinstance(argument, Path))
            left[0] -= path.name == name
            if path.name == name and not left[0]:
                os.truncate(path, path.stat().st_size // 2)
                die()

        return wrapped

    checkpoint.save_file = cutting(checkpoint.save_file)  # type: ignore[assignment]
    checkpoint._write_json = cutting(checkpoint._write_json)  # type: ignore[assignment]


def die_renaming(which: int) -> None:
    """Have this process die before the `which`-th checkpoint gets its name."""
    left, publish = [which], checkpoint.publish

    def dying(*arguments: Any) -> Path:
        left[0] -= 1
        if not left[0]:
            os.rename = lambda *_: die()
        return publish(*arguments)

    checkpoint.publish = dying


def die_pruning(_: int) -> None:
    """Have this process die when it has removed the first file of an old checkpoint."""

    remove = shutil.rmtree

    def dying(path: Path, **options: Any) -> None:
        if path.suffix == ".partial" or not path.exists():
            remove(path, **options)
            return
        next(path.glob("*.safetensors")).unlink()
        die()

    shutil.rmtree = dying  # type: ignore[assignment]


def train_and_die(world: World, folder: Path, rank: int, moment: str, which: int) -> None:
    if world.rank == rank:
        deaths = {"rename": die_renaming, "prune": die_pruning}
        deaths.get(moment, lambda which: die_writing(moment, which))(which)
    train_small(world, folder, EVERY_STEP)


MOMENTS = [  # rank, file that is half-written or what else, and which save of the attempt
    (1, rank_file(1, 2), 1),
    (0, "complete.json", 2),
    (0, "rename", 2),
    (0, "prune", 1),
]


def test_killed_at_every_moment_of_a_save(undisturbed: Path, tmp_path: Path):
    for rank, moment, which in MOMENTS:
        processes = start_ranks(2, train_and_die, tmp_path, rank=rank, moment=moment, which=which)
        outputs = wait_all(processes, 240)
        assert processes[rank].returncode == -signal.SIGKILL, (moment, outputs)
        assert processes[1 - rank].returncode not in (0, -signal.SIGKILL), (moment, outputs)
    # And now the newest whole one is damaged.
    newest = checkpoints(tmp_path)[-1]
    victim = newest / rank_file(1, 2)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    run_ranks(2, train_small, tmp_path, overrides=EVERY_STEP)
    assert f"{newest} is passed over" in (tmp_path / "output-0.txt").read_text()
    assert_same_end(tmp_path, undisturbed)
    left = sorted(path.name for path in (tmp_path / "small" / "checkpoints").glob("step-*"))
    assert left == ["step-00000007", "step-00000008"]


# -------------------------------------------------------------------- at any moment, on any number


def ranks_may_change() -> dict[str, Any]:
    """No draws that belong to a rank, and no softmax over one micro-step's samples."""
    return {
        "objective.targets": small_targets("image_i", "image_j", "category_i", "category_j"),
        "optimizer.global_batch_size": 12,
        "optimizer.max_micro_batch": 4,  # 4 x 3 on one rank, 2 x 3 on two, 4 x 1 on three
        "optimizer.duration": "10 steps",
        "checkpoint.every": "1 step",
    }


def test_killed_at_random_and_restarted_on_other_numbers_of_ranks(tmp_path: Path):
    overrides, chance = ranks_may_change(), random.Random(os.urandom(8))
    run_ranks(2, train_small, tmp_path / "whole", overrides=overrides)
    whole, folder = curve(tmp_path / "whole"), tmp_path / "killed"
    for attempt, ranks in enumerate((3, 1)):
        processes = start_ranks(ranks, train_small, folder, overrides=overrides)
        end = time.monotonic() + 240
        while steps_begun(folder) < 2 * (attempt + 1) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        chance.choice(processes).kill()
        outputs = wait_all(processes, 240)
        assert any(process.returncode != 0 for process in processes), outputs
    run_ranks(2, train_small, folder, overrides=overrides)
    lines = (folder / "small" / "metrics.jsonl").read_text().splitlines()
    for values in map(json.loads, lines):
        assert values["loss/total"] == pytest.approx(whole[values["step"]], rel=1e-4)
    assert {json.loads(line)["step"] for line in lines} == set(whole)


def steps_begun(folder: Path) -> int:
    path = folder / "small" / "metrics.jsonl"
    return len(set(path.read_text().splitlines())) if path.exists() else 0


# -------------------------------------------------------------------------------------- full disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * block)
            except OSError:
                continue


def train_on_a_full_disk(world: World, _: Path, disk: str, full: int, empty: int) -> str:
    """The disk is full from the end of step `full` to the end of step `empty`; how it ended."""
    folder = Path(disk)
    run = open_small(world, folder, EVERY_STEP | {"checkpoint.background": False})
    record = open_log(run)
    write = record.write

    def writing(step: int, *arguments: Any, **options: Any) -> None:
        if world.is_main and step == full:
            fill(folder)
        if world.is_main and step == empty:
            (folder / "filler").unlink()
        write(step, *arguments, **options)

    record.write = writing  # type: ignore[method-assign]
    try:
        loop.train_to_end(run, StopFlag(), record)
    except CheckpointError as error:
        return str(error)
    finally:
        record.close()
    return "finished"


def test_a_full_disk_is_outlived_or_leaves_the_last_checkpoint(
    undisturbed: Path, tmp_path: Path, tiny_disk: Path
):
    disk = str(tiny_disk)
    ends = run_ranks(2, train_on_a_full_disk, tmp_path, disk=disk, full=2, empty=99)
    assert ends == ["the last checkpoint could not be written; see the messages above"] * 2
    assert [path.name for path in checkpoints(tiny_disk)] == ["step-00000001", "step-00000002"]
    assert not checkpoint.remains(tiny_disk / "small" / "checkpoints")
    (tiny_disk / "filler").unlink()
    ends = run_ranks(2, train_on_a_full_disk, tmp_path, disk=disk, full=4, empty=6)
    assert ends == ["finished"] * 2
    said = (tmp_path / "output-0.txt").read_text()
    for step in (5, 6):
        assert f"checkpoint of step {step} failed: " in said
    assert "No space left on device" in said
    assert_same_end(tiny_disk, undisturbed)


# ----------------------------------------------------------------------------------------- signals


def train_slow_to_save(world: World, folder: Path, signals: int) -> bool:
    """Rank 1 is asked to stop in step 2, and rank 0 takes its time to save what follows."""
    run = open_small(world, folder, EVERY_STEP)
    flag = StopFlag(patience=0.5)
    record = open_log(run)
    save_file, train_step = checkpoint.save_file, loop.train_step

    def saving(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if world.rank == 1 and run.progress.step == 3:
            time.sleep(1)
            for _ in range(signals - 1):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        save_file(tensors, path)

    def stepping(*arguments: Any) -> Any:
        if world.rank == 1 and run.progress.step == 2:
            for _ in range(2):  # within a millisecond, as Slurm does
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    checkpoint.save_file, loop.train_step = saving, stepping  # type: ignore[assignment]
    finished = loop.train_to_end(run, flag, record)
    record.close()
    return finished


def test_a_signal_on_one_rank_saves_on_all_and_a_later_one_leaves_the_last_checkpoint(
    undisturbed: Path, tmp_path: Path
):
    assert run_ranks(2, train_slow_to_save, tmp_path, signals=1) == [False, False]
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == "step-00000003"
    shutil.rmtree(newest)
    processes = start_ranks(2, train_slow_to_save, tmp_path, signals=2)
    outputs = wait_all(processes, 240)
    assert processes[1].returncode == -signal.SIGTERM, outputs
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == "step-00000002"
    run_ranks(2, train_small, tmp_path, overrides=EVERY_STEP)
    assert_same_end(tmp_path, undisturbed)
