"""Exit codes and sentences: what is a mistake, what may pass, and who says so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from m3i_scale.cluster import launch
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.engine import ending
from m3i_scale.tasks.pretraining import CategoryError

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (CategoryError("x"), 2),
        (OSError(errno.ENOSPC, "full"), 2),
        (OSError(errno.EROFS, "read-only"), 2),
        (PermissionError(errno.EACCES, "denied"), 2),
        (NotADirectoryError(errno.ENOTDIR, "a file"), 2),
        (OSError(errno.EIO, "a disk dies"), 1),
        (OSError(errno.ESTALE, "NFS"), 1),
        (TimeoutError(errno.ETIMEDOUT, "slow"), 1),
        (RuntimeError("a fault of the program"), None),
        (ValueError("a fault of the program"), None),
    ],
)
def test_what_a_restart_would_mend(error, code):
    assert ending.exit_code(error) == code


def test_a_taken_port_is_mended_by_a_job_that_restarts_and_not_by_hand(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert ending.exit_code(launch.PortTakenError("n1", "29500")) == 2
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ending.exit_code(launch.PortTakenError("n1", "29500")) == 1


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (ConfigError("bad key"), "0", True),
        (ConfigError("bad key"), "3", False),
        (CategoryError("bad key"), "3", True),
        (launch.RankError("bad key"), "3", True),
        (OSError(errno.ENOSPC, "bad key", "file"), "3", True),
    ],
)
def test_the_rank_that_knows_says_it_and_notes_it(
    monkeypatch, tmp_path, capsys, variable, error, rank, said
):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, rank)
    note = tmp_path / "failure"
    monkeypatch.setenv(ending.NOTE, str(note))
    ending.explain(error, 2)
    assert ("bad key" in capsys.readouterr().err) == said
    assert note.exists() == said
    if said:
        assert note.read_text().startswith(f"rank {rank}: ")


def test_every_node_says_what_may_be_wrong_there_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ending.explain(ConfigError("there is no index"), 2)
    assert "there is no index" in capsys.readouterr().err


def test_what_may_pass_leaves_no_note(monkeypatch, tmp_path):
    monkeypatch.setenv(ending.NOTE, str(tmp_path / "failure"))
    monkeypatch.setenv("RANK", "0")
    ending.explain(OSError(errno.EIO, "a disk dies"), 1)
    assert not (tmp_path / "failure").exists()


def test_an_error_without_a_file_names_the_folder(tmp_path: Path):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConfigError, match=f"{tmp_path}: No space left on device; make room"):
        launch.from_rank_0(ALONE, full, tmp_path)


def fail_on_rank_0(world: World, folder: Path) -> str:
    def fail() -> None:
        assert world.is_main
        raise ConfigError("in use")

    try:
        launch.from_rank_0(world, fail, folder)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_all_ranks_end_with_what_rank_0_could_not_do(tmp_path):
    assert run_ranks(2, fail_on_rank_0, tmp_path) == ["in use", "in use"]


def test_a_sentence_stays_one_whatever_it_quotes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(ending.NOTE, str(tmp_path / "note"))
    ending.explain(ConfigError("a: " + "x\n" * 10_000 + "\ud800 the remedy"), 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2100
    assert "the remedy" in said
    assert "the remedy" in (tmp_path / "note").read_text()


def test_an_interrupt_is_said_while_a_library_holds_standard_error():
    """DeepSpeed points descriptor 2 at a file while it tries a compiler."""
    program = """
import os, signal
from m3i_scale.engine import ending
ending.end_on_interrupt()
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
signal.raise_signal(signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60)
    assert ended.returncode == 130
    assert ended.stderr == b"interrupted before training began\n"
