from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_scale.cluster import launch
from m3i_scale.cluster.launch import choose_device, rank_variables
from m3i_scale.config import ConfigError
from m3i_scale.ranks import torchrun

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}


def test_deepspeed_and_torchrun_speak_for_themselves():
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MEETING}
    assert rank_variables(given) == given


def test_srun_gives_ranks_through_slurms_variables():
    found = rank_variables({**SLURM, **MEETING})
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", **MEETING}


def test_srun_without_a_meeting_point_says_what_to_export():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        rank_variables(SLURM)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SLURM_LOCALID", "1"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1"), ("MPI_LOCALRANKID", "1")],
)
def test_a_rank_without_local_rank_takes_its_number_on_the_node(variable, value):
    found = rank_variables({"RANK": "3", "WORLD_SIZE": "4", **MEETING, variable: value})
    assert found["LOCAL_RANK"] == "1"


def test_ranks_that_would_all_take_the_first_gpu_are_refused():
    with pytest.raises(ConfigError, match="export LOCAL_RANK"):
        rank_variables({"RANK": "3", "WORLD_SIZE": "4", **MEETING})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "3"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **MEETING}, "ranks count from 0"),
        ({"RANK": "one", "WORLD_SIZE": "4", **MEETING}, "whole number"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_half_a_launcher_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        rank_variables(given)


def test_one_rank_of_a_launcher_meets_nobody_and_needs_no_given_port():
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **MEETING}
    found = rank_variables(given)
    assert found["MASTER_PORT"] != MEETING["MASTER_PORT"]
    assert found["MASTER_ADDR"] == "127.0.0.1"


def test_one_rank_of_torchrun_meets_torchruns_own_process(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "from m3i_scale.cluster import launch\n"
        "world = launch.start('cpu', 'fp32', 0, 1.0)\n"
        "print('joined as', world.rank, 'of', world.size, flush=True)\n"
        "launch.finish()\n"
    )
    done = subprocess.run(
        [*torchrun(1), program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "joined as 0 of 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["m3i_scale.engine.loop", "m3i_scale.data.stream", "m3i_kernels._backend"]
)
def test_every_module_of_both_packages_is_heard(name, capfd):
    before = {package: vars(logging.getLogger(package)).copy() for package in launch.PACKAGES}
    try:
        launch.setup_logging(0)
        logging.getLogger(name).info("a word of %s", name)
    finally:
        for package, state in before.items():
            vars(logging.getLogger(package)).update(state)
            logging.getLogger(package).manager._clear_cache()
    assert f"[rank 0] a word of {name}" in capfd.readouterr().err


def test_every_module_has_a_logger_of_its_name():
    root = Path(launch.__file__).parents[2]
    for folder in ("m3i_scale", "kernels/m3i_kernels"):
        for path in (root / folder).rglob("*.py"):
            for call in re.findall(r"^\w+ = logging\.getLogger\((.*)\)", path.read_text(), re.M):
                assert call == "__name__", path


def test_alone_without_any_launcher():
    found = rank_variables({})
    assert (found["RANK"], found["WORLD_SIZE"]) == ("0", "1")
    assert 0 < int(found["MASTER_PORT"]) < 65536


def test_a_gpu_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        choose_device("cuda", "bf16", 0)
    assert choose_device("auto", "bf16", 0).type == "cpu"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_device("auto", "fp16", 0)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(choose_device("auto", "fp16", 1)) == "cuda:1"
    with pytest.raises(ConfigError, match="local rank 2 has no GPU"):
        choose_device("auto", "bf16", 2)
