from __future__ import annotations

import pytest

from m3i_scale.cluster.launch import choose_device, rank_variables
from m3i_scale.config import ConfigError

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
