"""`m3i doctor`: each thing that can be missing is named with what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m3i_scale import cli
from m3i_scale.cluster import doctor, node_state
from m3i_scale.cluster.doctor import Finding


def found(check: Callable[[Path], Iterator[Finding]], folder: Path = Path()) -> dict[str, Finding]:
    return {one.name: one for one in check(folder)}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="H", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(node_state, "gpu_problem", lambda *_: None)


def test_the_exit_code_says_whether_something_is_missing(monkeypatch, tmp_path, capsys):
    checks = {"a": lambda _: iter([Finding("a", "1"), Finding("b", "2", "advice", "do c")])}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Training can start here.\n")
    checks["x"] = lambda _: iter([Finding("x", "none", "missing", "install x")])
    assert cli.main(["doctor"]) == 2
    assert "missing x: none\n        -> install x\n1 missing\n" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 2
    written = json.loads(capsys.readouterr().out)
    assert not written["ready"]
    assert [one["state"] for one in written["findings"]] == ["ok", "advice", "missing"]


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, capsys, monkeypatch):
    def noisy(_: Path) -> Iterator[Finding]:
        print("[WARNING] from an import")
        yield Finding("noisy", "1")

    monkeypatch.setitem(doctor.CHECKS, "noisy", noisy)
    cli.main(["doctor", "--json", "--folder", str(tmp_path / "not" / "yet")])
    names = {one["name"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert names >= {"python", "torch", "deepspeed", "GPU", "DeepSpeed's accelerator", "C compiler",
                     "shared memory", "run folder", "Triton's cache", "open files",
                     "network interfaces", "noisy"}  # fmt: skip
    assert not (tmp_path / "not").exists()


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken(_: Path) -> Iterator[Finding]:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", {"DeepSpeed": broken, "python": doctor._python})
    first, second = doctor.examine(Path())
    assert (first.name, first.state, second.state) == ("DeepSpeed", "missing", "ok")
    assert "libcudart.so.12" in first.value


def test_packages_that_are_missing_or_too_old(monkeypatch):
    required = ["torch>=2.8", "nowhere-to-be-found>=1", "numpy>=99", 'other>=1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: required)
    packages = found(doctor._packages)
    assert packages["torch"].state == "ok"
    assert packages["nowhere-to-be-found"].remedy == "pip install 'nowhere-to-be-found>=1'"
    assert packages["numpy"].state == "missing"
    assert "other" not in packages


@pytest.mark.parametrize(
    ("driver", "built", "state", "words"),
    [(None, "12.8", "ok", ""), ("570.1", None, "missing", "built for CPUs"),
     ("450.1", "12.8", "missing", "the driver 450.1 may be too old for CUDA 12.8")],
)  # fmt: skip
def test_no_gpu(monkeypatch, driver, built, state, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    gpu = found(doctor._gpus)["GPU"]
    assert gpu.state == state
    assert words in gpu.remedy


def test_a_gpu_and_what_is_wrong_with_it(one_gpu, monkeypatch):
    findings = found(doctor._gpus)
    assert findings["GPU 0"] == Finding("GPU 0", "H, 80 GiB, sm_90")
    assert findings["NCCL"].value == "2.27.3"
    monkeypatch.setattr(node_state, "gpu_problem", lambda *_: "GPU 0 multiplies wrongly")
    assert found(doctor._gpus)["GPU 0"].remedy == "GPU 0 multiplies wrongly"


def test_a_compiler_is_needed_where_triton_runs(one_gpu, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (finding,) = doctor._compiler(Path())
    assert finding.state == "missing"
    assert "install gcc" in finding.remedy
    monkeypatch.setenv("CC", "no-such-cc")
    assert "CC=no-such-cc is no program" in found(doctor._compiler)["C compiler"].value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(doctor._compiler)["C compiler"].state == "advice"


def test_little_room(monkeypatch, tmp_path):
    usage = SimpleNamespace(total=64 * 2**20, free=60 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    memory = found(doctor._shared_memory)["shared memory"]
    assert memory.state == "missing"
    assert "--shm-size" in memory.remedy
    disks = found(doctor._disks, tmp_path)
    assert [disk.state for disk in disks.values()] == ["advice", "advice"]
    assert "TRITON_CACHE_DIR" in disks["Triton's cache"].remedy
    (tmp_path / "file").write_text("")
    assert found(doctor._disks, tmp_path / "file" / "runs")["run folder"].state == "missing"


def test_low_limits(monkeypatch):
    monkeypatch.setattr(doctor, "_infiniband", lambda: ["mlx5_0"])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 65536))
    limits = found(doctor._limits)
    assert limits["open files"].remedy.startswith("ulimit -n 4096")
    assert "ulimit -l unlimited" in limits["locked memory"].remedy


@pytest.mark.parametrize(
    ("value", "state"),
    [("eth", "ok"), ("=eth0", "ok"), ("^lo", "ok"), ("ib0,eth0", "ok"), ("ib0", "missing")],
)
def test_a_variable_that_names_an_interface(tmp_path, monkeypatch, value, state):
    (tmp_path / "eth0").mkdir()
    (tmp_path / "eth0" / "operstate").write_text("up\n")
    monkeypatch.setattr(doctor, "INTERFACES", tmp_path)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    findings = found(doctor._network)
    assert findings["network interfaces"].value == "eth0 (up)"
    assert findings["NCCL_SOCKET_IFNAME"].state == state
