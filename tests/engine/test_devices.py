"""The device of a run is the one its configuration names, whatever the machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.run_folder import captioned_config
from helpers.shards import write_images
from m3i_scale.cluster import launch
from m3i_scale.config import dump_config, load_config

ROOT = Path(__file__).parents[2]
# A machine that shows one GPU, and fails where anybody works on it.
WITH_A_GPU = """
import runpy, sys, torch
from unittest.mock import Mock
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_name = lambda *a: "stand-in"
for name in ("current_stream", "set_device", "synchronize"):
    setattr(torch.cuda, name, Mock(side_effect=AssertionError("a CPU run touches the GPU")))
# PyTorch's own optimisers ask the GPU whether it records a graph.
for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
    setattr(torch.optim.Optimizer, name, lambda self: None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", [None, "cuda"])
def test_a_cpu_run_leaves_the_machines_gpu_alone(tmp_path: Path, variable: str | None):
    sources = [
        {"name": kind, "index": write_images(tmp_path, kind, range(16), kind), "kind": kind}
        for kind in ("text", "category")
    ]
    config = captioned_config(tmp_path, {"data.sources": sources})
    assert config.engine.device == "cpu"
    file = tmp_path / "cpu.yaml"
    file.write_text(dump_config(config))
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment |= {"DS_ACCELERATOR": variable} if variable else {}
    command = [sys.executable, "-c", WITH_A_GPU, ROOT / "m3i_scale" / "train.py", "--config", file]
    done = subprocess.run(
        [*command, "optimizer.duration=2 steps", "optimizer.warmup=1 steps"],
        env={**environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_the_demonstration_runs_on_cpus_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    spec = load_config(ROOT / "configs" / "demo.yaml", []).engine
    assert [launch.choose_device(spec.device, spec.precision, r).type for r in (0, 1)] == [
        "cpu"
    ] * 2


def test_deepspeed_imported_for_another_device_is_not_trained_on(monkeypatch: pytest.MonkeyPatch):
    import deepspeed.accelerator

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    other = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(type(other), "device_name", lambda self, index=None: "cuda")
    with pytest.raises(RuntimeError, match="works on cuda, this rank on cpu"):
        launch.choose_accelerator("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
