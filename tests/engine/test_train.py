"""The program as users start it: exit codes, sentences, and what becomes of the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from helpers.ranks import start_program, wait_all
from helpers.shards import write_images
from helpers.small import labelled_tree
from m3i_scale.engine import checkpoint
from m3i_scale.report import read, summary

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "m3i_scale" / "train.py")


def start(*words: str, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    drop = ("SLURM", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    environment = clean | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*(prefix or (sys.executable,)), TRAIN, *words], env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
    )  # fmt: skip


def ended(said: str) -> str:
    """What a program has said, which is no fault's trace."""
    assert "Traceback" not in said, said
    assert "FutureWarning" not in said, said
    return said


def start_to_end(*words: str) -> tuple[int, str]:
    """Exit code and output of the program in an interpreter of its own, with all its imports."""
    process = start(*words)
    said, _ = process.communicate(timeout=240)
    return process.returncode, ended(said)


def train(*words: str, **variables: str) -> tuple[int | None, str]:
    """Exit code and output of the program; a fork that need not import everything again."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_program("m3i_scale.train", words, Path(folder) / "output.txt", **variables)
        (said,) = wait_all([process], 240)
    return process.returncode, ended(said)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a configuration, and a run of four steps."""
    folder = tmp_path_factory.mktemp("home")
    index = write_images(folder, "classes", range(40), "category")
    overrides = {
        "folder": str(folder / "runs"),
        "optimizer.duration": "4 steps",
        "checkpoint": {"every": "1 steps", "keep_last": 2},
        "logging.trackers": ["tensorboard", "csv"],
    }
    tree = labelled_tree(index, overrides)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    code, said = start_to_end("--config", str(folder / "c.yaml"))
    assert code == 0, said
    return folder


@pytest.fixture
def begun(home: Path, tmp_path: Path) -> tuple[str, ...]:
    """Words that start the run of four steps again, a copy of it."""
    shutil.copytree(home / "runs" / "small", tmp_path / "small")
    return ("--config", str(home / "c.yaml"), f"folder={tmp_path}")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps(folder: Path) -> list[int]:
    found = checkpoint.complete_checkpoints(folder / "small" / "checkpoints")
    return [checkpoint.step_of(path) for path in found]


def test_the_record_of_a_run(home):
    names = {path.name for path in (home / "runs" / "small").iterdir()}
    assert names == {"config.yaml", "deepspeed.json", "origin.json", "metrics.jsonl",
                     "metrics.csv", "events.jsonl", "flops.json", "tensorboard",
                     "checkpoints"}  # fmt: skip


@pytest.mark.parametrize("overrides", [["optimizer.learning_rate=1e-5"], ["run=new"]])
def test_a_dry_run_writes_nothing(begun, tmp_path, overrides):
    before = content(tmp_path)
    code, said = train(*begun, "--dry-run", *overrides)
    assert code == 0
    assert "checkpoint every" in said
    assert content(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("length", [2, 4])
def test_a_run_that_is_longer_already_is_finished(begun, tmp_path, length):
    before = (tmp_path / "small" / "config.yaml").read_text()
    code, said = train(*begun, f"optimizer.duration={length} steps")
    assert code == 0
    assert (tmp_path / "small" / "config.yaml").read_text() == before
    assert f"nothing to do: 4 steps are done and optimizer.duration asks for {length}" in said
    assert steps(tmp_path) == [3, 4]


def test_another_seed_is_refused_and_leaves_the_folder_alone(begun, tmp_path):
    before = content(tmp_path)
    code, said = train(*begun, "seed=7", "optimizer.duration=5 steps")
    assert code == 2
    assert "seed was 0 and is 7" in said
    assert content(tmp_path) == before
    words = ("seed=7", "--accept-change", "seed", "optimizer.duration=5 steps")
    code, said = train(*begun, *words)
    assert code == 0
    assert "accepted: seed was 0 and is 7" in said
    assert steps(tmp_path) == [4, 5]


def test_fewer_classes_than_labels_are_refused_at_start(home, tmp_path):
    words = (f"folder={tmp_path}", "model.categories=3")
    code, said = train("--config", str(home / "c.yaml"), *words)
    assert code == 2
    assert "has samples of category 4; set model.categories to 5 or more (it is 3)" in said


def test_a_second_start_is_refused_and_a_killed_ones_successor_is_not(begun, tmp_path):
    words = (*begun, "optimizer.duration=100000 steps", "checkpoint.every=100000 steps")
    first = start_program("m3i_scale.train", words, tmp_path / "first.txt")
    metrics = tmp_path / "small" / "metrics.jsonl"
    before = metrics.stat().st_size
    end = time.monotonic() + 120
    while metrics.stat().st_size == before and time.monotonic() < end:
        time.sleep(0.1)
    code, said = train(*begun)
    assert code == 2
    assert f"process {first.pid} on {socket.gethostname()}" in said
    killed = time.time()
    first.kill()
    wait_all([first], 60)
    code, said = train(*begun, "optimizer.duration=6 steps")
    assert code == 0
    assert "is taken over" in said
    assert not (tmp_path / "small" / "lock.json").exists()
    explains(tmp_path / "small", killed)


def explains(folder: Path, killed: float) -> None:
    """What `m3i report` says: four steps, as many as there were until `kill -9`, and two more."""
    report, _ = summary.summarise(read.read_trace(folder), time.time())
    assert [one["cause"] for one in report["attempts"]] == ["finished", "killed", "finished"]
    _, lost, last = report["attempts"]
    assert lost["first_step"]["step"] == last["first_step"]["step"] == 4
    assert report["steps"]["made_again"] == lost["steps"]
    assert abs(lost["end"] - killed) < 10
    for one in report["attempts"]:
        parts = one["start_up"]
        assert set(parts) == {"imports", "nodes", "data", "checkpoint", "networks", "first steps"}
        assert all(seconds >= 0 for seconds in parts.values())
    assert sum(report["shares"].values()) == pytest.approx(report["seconds"])
    assert report["interruptions"][1]["cause"] == "killed"
    assert report["damaged_lines"] == {}


@pytest.mark.parametrize("what", ["file", "full"])
def test_a_run_folder_that_cannot_be_written_is_a_sentence(home, tmp_path, what):
    folder = tmp_path / "folder"
    if what == "file":
        folder.write_text("")
    else:
        folder.symlink_to("/proc")
    note = tmp_path / "failure"
    words = ("--config", str(home / "c.yaml"), f"folder={folder}")
    code, said = train(*words, M3I_FAILURE=str(note))
    assert code == 2
    assert f"error: {folder}" in said
    assert f"{folder}" in note.read_text()


def test_a_taken_port_is_a_sentence(home, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        words = ("--config", str(home / "c.yaml"), f"folder={tmp_path}")
        code, said = train(*words, RANK="0", LOCAL_RANK="0", **where)
    assert code == 2
    assert f"cannot meet at 127.0.0.1:{port}" in said


def test_what_scripts_ask_for_is_printed_at_once(home):
    config = str(home / "c.yaml")
    code, said = start_to_end("run='a name'", "--config", config, "--print", "run_folder", "seed=1")
    assert (code, said) == (0, f"{home}/runs/a name\n")
    code, said = start_to_end("--config", config, "--print", "run", "no.such=1")
    assert code == 2
    code, said = start_to_end("--version")
    assert code == 0
    assert said.startswith("m3i-scale")


def test_an_interrupt_while_starting_is_one_line(home):
    process = start("--config", str(home / "c.yaml"), "run=interrupted")
    # The first of the large libraries that a start loads; training begins seconds later.
    maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted before training began"
    assert "Traceback" not in said


def test_ranks_stop_and_save_when_deepspeed_is_gone(home, tmp_path):
    """SIGTERM ends the launcher alone; its ranks would train on for nobody."""
    words = ("--config", str(home / "c.yaml"), f"folder={tmp_path}", "checkpoint.every=1000 steps",
             "optimizer.duration=100000 steps", "optimizer.max_micro_batch=4")  # fmt: skip
    launcher = Path(sys.executable).parent / "deepspeed"
    top = start(*words, prefix=(sys.executable, str(launcher), "--num_accelerators", "2",
                                "--master_port", str(_free_port())))  # fmt: skip
    metrics = tmp_path / "small" / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    os.kill(top.pid, signal.SIGTERM)
    top.wait(20)
    said = top.stdout.read() if top.stdout else ""  # to its end: until all ranks have gone
    assert "asked to stop by the end of its launcher" in said
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert steps(tmp_path) == [last + 1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
