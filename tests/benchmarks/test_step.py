"""The benchmark of the training step: accounting for a trace's time, and a small real run."""

import csv
import json
import os
import pathlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

BENCH = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import timeline

    return timeline


def event(category: str, name: str, start: float, end: float, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start,
        "args": arguments,
    }  # fmt: skip


def test_a_gpus_time_is_given_to_one_category_and_phase(timeline: ModuleType) -> None:
    events = [
        event("user_annotation", "m3i step", 1000, 2000),
        event("user_annotation", "m3i phase: forward", 1100, 1400),
        event("user_annotation", "m3i phase: targets", 1100, 1200),
        event("user_annotation", "m3i phase: backward", 1400, 1500),
        # launched in one phase, run in another
        event("cuda_runtime", "cudaLaunchKernel", 1150, 1151, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 1350, 1351, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 1450, 1451, correlation=3),
        event("cuda_driver", "cuLaunchKernel", 1460, 1461, correlation=4),
        event("kernel", "sm90_xmma_gemm_bf16", 1200, 1500, correlation=1),
        event("kernel", "dcnv3_forward_kernel", 1500, 1600, correlation=2),
        # the first 50 hide behind the convolution above
        event("kernel", "ncclDevKernel_AllGather", 1550, 1700, correlation=3),
        event("kernel", "dcnv3_backward_kernel", 1800, 1900, correlation=4),
        event("cpu_op", "aten::mm", 1000, 2000),
        event("gpu_user_annotation", "m3i step", 1150, 1900),
    ]
    table = timeline.tabulate(events)
    assert table.microseconds == {
        ("idle", "input"): 300,  # before the phases, and twice after them
        ("idle", "targets"): 100,
        ("GEMM", "targets"): 300,
        ("dcnv3", "forward"): 100,
        ("communication", "backward"): 100,
        ("dcnv3", "backward"): 100,
    }
    assert table.per_step() == pytest.approx(1.0)
    assert table.per_step("dcnv3") == pytest.approx(0.2)
    ran = timeline.kernels(events)
    assert sum(kernel.milliseconds for kernel in ran) == pytest.approx(0.65)
    assert ran[0] == ("sm90_xmma_gemm_bf16", 1, pytest.approx(0.3))
    text = timeline.markdown(table)
    assert "| dcnv3 | 0.00 | 0.00 | 0.10 | 0.10 | 0.20 | 20.0% |" in text
    assert "hidden behind other work: 0.05 ms per step" in text


def test_a_cpus_time_goes_to_the_innermost_operator(timeline: ModuleType) -> None:
    events = [
        event("user_annotation", "m3i step", 0, 100),
        event("user_annotation", "m3i phase: forward", 0, 60),
        event("user_annotation", "m3i phase: EMA", 60, 100),
        event("cpu_op", "aten::linear", 0, 50),
        event("cpu_op", "aten::addmm", 10, 40),
        event("cpu_op", "aten::lerp_", 60, 90),
    ]
    table = timeline.tabulate(events)
    assert table.microseconds == {
        ("norm, elementwise", "forward"): 20,
        ("GEMM", "forward"): 30,
        ("idle", "forward"): 10,
        ("EMA", "EMA"): 30,
        ("idle", "EMA"): 10,
    }


def test_needs_an_annotated_step(timeline: ModuleType) -> None:
    with pytest.raises(ValueError, match="no step was profiled"):
        timeline.tabulate([event("kernel", "gemm", 0, 1)])


@pytest.mark.cpu_only
@pytest.mark.distributed
def test_measures_the_real_step(tmp_path: pathlib.Path, timeline: ModuleType) -> None:
    from helpers.small import (
        SMALL,  # it needs what reads data, which a machine for kernels may lack
    )

    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, BENCH / "step.py", "--config", tmp_path / "small.yaml"]
    sizes = ["--micro-batch", 4, "--accumulation", 2, "--warmup", 1, "--steps", 2, "--profile", 1]
    done = subprocess.run(
        [*map(str, [*command, *sizes, "--out", tmp_path]), "optimizer.teacher_momentum=0.9"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "step_small.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["device"], row["ranks"], row["micro_batch"]) == ("cpu", "1", "4")
    assert row["accumulation"] == "2"
    assert row["mfu"] == ""  # a CPU has no peak here
    seconds = 8 / float(row["images_per_second"])
    work = float(row["gflops_per_image"]) * 8
    assert float(row["tflops_per_device"]) == pytest.approx(work / seconds / 1e3)
    assert float(row["peak_memory_gib"]) > 0.1
    text = (tmp_path / "step_small.md").read_text()
    for name in ("GEMM", "dcnv3", "augmentation, mixing", "optimiser", "EMA"):
        assert f"| {name} |" in text
    known = json.loads((tmp_path / "step_small.json").read_text())
    assert (len(known["warmup"]), len(known["steps"])) == (1, 2)
    assert known["kernel_ms"] >= known["kernels"][0]["milliseconds"] > 0
    assert known["known_after"]["kernels"] > known["known_after"]["steps"] > 0
    table = timeline.tabulate(timeline.read_trace(tmp_path / "step_small.trace.json.gz"))
    assert all(table.per_step(phase=phase) > 0 for phase in timeline.PHASES)
    assert not (tmp_path / "runs").exists()  # a run of that name is not touched
