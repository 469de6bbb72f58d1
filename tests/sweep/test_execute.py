from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import yaml

from helpers.run_folder import captioned_config
from helpers.shards import write_images
from helpers.sweeps import GRID, finish, make, write_sweep
from m3i_scale.cli import main
from m3i_scale.config import dump_config, load_config
from m3i_scale.sweep import execute, progress
from m3i_scale.sweep.grid import Cell
from m3i_scale.sweep.spec import Evaluation, Sweep

TRAINED = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1]); steps = int(sys.argv[2])
done = folder / "checkpoints" / f"step-{steps:08d}"
done.mkdir(parents=True, exist_ok=True)
(done / "complete.json").write_text("{}")
(folder / "metrics.jsonl").write_text("")
"""
EVALUATED = """
import json, pathlib, sys
row = {"task": "kNN", "trained": 0.5, "untrained": 0.25, "chance": 0.1}
pathlib.Path(sys.argv[1], "eval.json").write_text(json.dumps({"rows": [row]}))
"""
Programs = Callable[[str, str], None]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Put short programs in the place of training and evaluation; NAME in them is the cell's."""

    def replace(train: str = TRAINED, evaluate: str = EVALUATED) -> None:
        def command(code: str, cell: Cell) -> list[str]:
            folder = str(cell.folder)
            code = code.replace("NAME", repr(cell.name))
            return [sys.executable, "-c", code, folder, str(cell.steps)]

        def train_command(sweep: Sweep, cell: Cell) -> list[str]:
            return command(train, cell)

        def evaluate_command(cell: Cell, evaluation: Evaluation) -> list[str]:
            return command(evaluate, cell)

        monkeypatch.setattr(execute, "train_command", train_command)
        monkeypatch.setattr(execute, "evaluate_command", evaluate_command)

    return replace


def outcomes(sweep: Sweep, grid: list[Cell]) -> dict[str, str]:
    return {outcome.cell.name: outcome.what for outcome in execute.run_cells(sweep, grid)}


def test_all_cells_run_once(tmp_path: Path, programs: Programs):
    programs(TRAINED + "print('here', 6 * 7)", EVALUATED)
    sweep, grid = make(tmp_path)
    assert set(outcomes(sweep, grid).values()) == {"finished"}
    assert set(outcomes(sweep, grid).values()) == {"skipped"}
    log = execute.log_file(sweep, grid[0]).read_text()
    assert log.count("here 42") == 1


def test_a_failing_cell_is_named_and_stops_no_other(
    tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
):
    programs("if 'one-seed0' in NAME: raise SystemExit('out of luck')\n" + TRAINED, EVALUATED)
    file = write_sweep(tmp_path)
    assert main(["sweep", str(file)]) == 1
    captured = capsys.readouterr()
    assert "failed: one-seed0: out of luck (exit code 1; " in captured.err
    assert "1 of 4 runs failed" in captured.err
    assert "Not finished: one-seed0." in captured.out
    sweep, grid = make(tmp_path)
    assert sorted(progress.is_finished(cell, sweep.evaluation) for cell in grid) == [
        False, True, True, True,
    ]  # fmt: skip
    programs(TRAINED, EVALUATED)  # mended: only the missing one runs
    assert list(outcomes(sweep, grid).values()) == ["skipped", "finished", "skipped", "skipped"]


def test_a_trained_cell_is_only_evaluated(tmp_path: Path, programs: Programs):
    programs(TRAINED, "raise SystemExit(3)")
    sweep, grid = make(tmp_path)
    assert outcomes(sweep, grid[:1]) == {"0.5-seed0": "failed"}
    programs("raise SystemExit('trained again')", EVALUATED)
    assert outcomes(sweep, grid[:1]) == {"0.5-seed0": "finished"}


def test_two_processes_share_the_cells(tmp_path: Path, programs: Programs):
    programs()
    sweep, grid = make(tmp_path)
    log = execute.log_file(sweep, grid[1])
    log.parent.mkdir(parents=True)
    with log.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert list(outcomes(sweep, grid).values()) == ["finished", "taken", "finished", "finished"]
    assert outcomes(sweep, grid)[grid[1].name] == "finished"


def test_a_signal_reaches_the_run_and_ends_the_sweep(tmp_path: Path, programs: Programs):
    waiting = tmp_path / "waiting"
    programs(f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
pathlib.Path({str(waiting)!r}).touch()
time.sleep(60)
""")  # fmt: skip
    sweep, grid = make(tmp_path)

    def stop() -> None:
        while not waiting.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    found = outcomes(sweep, grid)
    thread.join()
    assert found == {"0.5-seed0": "stopped"}  # and the others are not begun
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_commands(tmp_path: Path):
    sweep, grid = make(tmp_path, ranks=2)
    command = execute.train_command(sweep, grid[0])
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert load_config(command[command.index("--config") + 1]) == grid[0].config
    gallery = execute.evaluate_command(grid[0], sweep.evaluation)
    at = gallery.index("--gallery")
    indexes = [source.index for source in grid[0].config.data.sources]
    assert gallery[at + 1 : at + 3] == indexes  # the indexes it was trained on


def test_dry_run_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = str(write_sweep(tmp_path))
    assert main(["sweep", file, "--dry-run"]) == 0
    assert "   3  one-seed5  not begun" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    mistakes = {
        "cell 0.5-seed0: ": [file, "set=[model.text=null]", "--dry-run"],
        "runs 0 to 3": [file, "--only", "4"],
        "is finished; there is nothing to compare": [file, "--report"],
        "did you mean 'seeds'": [file, "seed=[1]"],
        "cell 0.5-seed0: optimizer.warmup (9 steps = 9 steps) must be shorter": [
            file,
            "set=[optimizer.warmup=9 steps]",
            "--dry-run",
        ],
        "data source texts: there is no file gone.parquet": [
            file,
            "set=[data.sources.0.index=gone.parquet]",
        ],
        "model.text.tokenizer: there is no file gone.json": [
            file,
            "set=[model.text.tokenizer=gone.json]",
        ],
        "evaluation.queries: there is no file gone.parquet": [
            file,
            "evaluation.queries=gone.parquet",
            "--slurm",
        ],
        "evaluation.gallery: there is no file gone.parquet": [
            file,
            "evaluation.gallery=gone.parquet",
        ],
    }
    for words, arguments in mistakes.items():
        assert main(["sweep", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_only_one_cell_on_request(tmp_path: Path, programs: Programs):
    programs()
    assert main(["sweep", str(write_sweep(tmp_path)), "--only", "2"]) == 0
    sweep, grid = make(tmp_path)
    assert [progress.is_finished(c, sweep.evaluation) for c in grid] == [False, False, True, False]
    assert not (sweep.own_folder / "results.md").exists()


def test_slurm_script_is_of_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_sweep(tmp_path)
    sweep, grid = make(tmp_path)
    finish(grid[1], sweep, {"kNN": 0.5})
    assert main(["sweep", str(file), "evaluation.batch=64", "--slurm"]) == 0
    script = tmp_path / "runs" / "small" / "sweep.sbatch"
    assert capsys.readouterr().out == f"sbatch {script}\n"
    text = script.read_text()
    assert "#SBATCH --array=0,2-3\n" in text
    assert f'sweep {file} evaluation.batch=64 --only "$SLURM_ARRAY_TASK_ID"' in text
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
def test_a_real_sweep_of_two_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    start = execute._call

    def evaluate_here(command: list[str], log: IO[bytes], stopper: execute.Stopper) -> int:
        """Trainings are processes; evaluations are spared the time to import everything."""
        if command[1:4] == ["-m", "m3i_scale.cli", "eval"]:
            return main(command[3:])
        return start(command, log, stopper)

    monkeypatch.setattr(execute, "_call", evaluate_here)
    base = yaml.safe_load(dump_config(captioned_config(tmp_path)))
    base["data"]["sources"] = [
        {
            "name": "both",
            "kind": "both",
            "index": write_images(tmp_path, "train", range(16), "both"),
        }
    ]
    file = tmp_path / "sweep.yaml"
    write_sweep(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(base))
    grid = {
        **GRID,
        "folder": str(tmp_path / "runs"),
        "samples": 16,
        "seeds": [0],
        "set": ["optimizer.warmup=1 steps"],
        "evaluation": {"queries": write_images(tmp_path, "heldout", range(20, 30), "both")},
    }
    file.write_text(yaml.safe_dump(grid))
    assert main(["sweep", str(file)]) == 0
    out = capsys.readouterr().out
    assert "linear probe caption subject" in out
    assert "Not finished" not in out
    folder = tmp_path / "runs" / "small"
    for name in ("0.5-seed0", "one-seed0"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1]
        assert json.loads((folder / name / "eval.json").read_text())["step"] == 2
    assert (folder / "results.png").read_bytes()[:4] == b"\x89PNG"
