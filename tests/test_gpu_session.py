"""The session on a GPU: every part under its limit, whatever the one before did; and its report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SESSION = ROOT / "benchmarks" / "gpu_session"
FIRST = SESSION / "results" / "2026-11-26_h100_first"
PARTS = ["setup", "tests", "transfer", "audit", "step", "host", "matrix", "depthwise", "dcnv3"]
# Stands in for Python: some parts end, one fails, one never ends; reports are real.
STAND_IN = f"""#!/usr/bin/env bash
case $1 in
    *environment.py) echo '{{"part": "setup"}}' >>"$M3I_SESSION/rows.jsonl" ;;
    *audit.py) echo "what went wrong"; exit 1 ;;
    *host.py) sleep 60 ;;
    *report.py) exec {sys.executable} "$@" ;;
    *training_step.py) test "$2" -le 250 ;;
esac
"""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SESSION / "run.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_keep_the_next_from_running(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run(out, "--python", python, "--seconds", 12)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    outcomes = {row["name"]: row["outcome"] for row in rows if row["part"] == "parts"}
    assert sorted(outcomes) == sorted(PARTS)
    assert (outcomes["setup"], outcomes["audit"], outcomes["host"]) == ("ok", "failed", "timeout")
    assert outcomes["step"] == "ok"
    assert "what went wrong" in (out / "session.log").read_text()
    assert (out / "raw.tar.gz").stat().st_size > 0
    assert "| audit |" in (out / "report.md").read_text()
    assert len(list(out.iterdir())) <= 8
    for name in PARTS:
        assert re.search(rf"^\| {name} \| .* \| {outcomes[name]} \|", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("part", "code"), [("audit", 1), ("setup", 0)])
def test_a_rehearsal_that_did_not_come_through_is_an_error(tmp_path: Path, part: str, code: int):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = run(tmp_path / "out", "--python", python, "--only", part, "--rehearse")
    assert done.returncode == code, done.stdout + done.stderr


def test_only_some_parts(tmp_path: Path):
    done = run(tmp_path, "--python", "true", "--only", "tests,dcnv3")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [
        json.loads(line)["name"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    assert names == ["tests", "dcnv3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: run.sh OUT"),
        (["OUT", "--fast"], "there is no option --fast"),
        (["OUT", "--wheels"], "--wheels needs a value"),
        (["OUT", "--wheels", "/nowhere"], "there is no wheel in /nowhere"),
        (["OUT", "--cubins"], "--cubins needs a value"),
        (["OUT", "--cubins", "/nowhere"], "there are no kernels in /nowhere"),
        (["OUT", "--only", "step,kernels"], "there is no part kernels"),
    ],
)
def test_refuses(arguments: list[str], message: str, tmp_path: Path):
    done = run(*[tmp_path / "out" if a == "OUT" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_wheels_are_those_the_project_asks_for():
    head = (SESSION / "run.sh").read_text()
    wheels = dict(re.findall(r"([a-z][a-z-]+)==([0-9.]+)", head))
    dependencies = re.findall(
        r'^    "([a-z]+)>=([0-9.]+)', (ROOT / "pyproject.toml").read_text(), re.M
    )
    for name, least in dependencies:
        if name in ("deepspeed", "pydantic", "webdataset"):
            assert [*map(int, wheels[name].split("."))] >= [*map(int, least.split("."))]


def write(folder: Path, *rows: dict[str, object]) -> None:
    origin = {"device": "NVIDIA H100", "driver": "580", "torch": "2.11", "commit": "abc"}
    lines = [json.dumps({**row, **origin}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines, '{"part": "st']) + "\n")


def test_report_of_what_was_measured(tmp_path: Path):
    write(
        tmp_path,
        {"part": "parts", "name": "step", "seconds": 90.0, "limit": 165, "outcome": "ok"},
        {"part": "step", "name": "micro-batch 128", "ok": False, "note": "out of GPU memory"},
        {
            "part": "step", "name": "micro-batch 64", "ok": True, "note": "", "warmup": [9.0, 2.0],
            "steps": [1.5], "step_ms_p50": 1500.0, "kernel_ms": 400.0, "peak_memory_gib": 33.0,
            "images_per_second": 42.0, "mfu": 0.1, "gather_steps": [1.625],
            "twice": {"seconds": [4.75, 4.5], "peak_memory_gib": 40.0, "problem": "",
                      "verify/steps_computed_twice": 2},
            "dcnv3": ["dcnv3 at 12 x 12, 1280 channels in 40 groups: matrix kernel (as asked)"],
        },
        {"part": "step", "name": "plan 64", "step_ms": 380.0, "computing_ms": 370.0,
         "tensors_gib": 31.0, "utilisation": 0.3, "images_per_second": 168.0},
        {"part": "step", "name": "kernel", "kernel": "void at::gemm<at::tall, float>(int)",
         "calls": 3, "milliseconds": 100.0},
        {"part": "audit", "name": "weights", "ok": False, "figure": 0.5, "bound": 1e-3},
        *({"part": "depthwise", "name": "H 192 stage 1", "direction": "both", "ok": True, "ms": ms,
           "implementation": name, "error": 1e-3, "gb_per_s": 500.0, "fraction_of_copy": 0.2}
          for name, ms in (("triton", 1.9), ("torch eager", 2.9))),
        *({"part": "depthwise", "name": f"320 x 48 {layout}", "direction": "forward", "ok": True,
           "channels": 320, "side": 48, "layout": layout, "implementation": "cudnn", "ms": ms}
          for layout, ms in (("nchw", 1.6), ("channels_last", 0.3))),
        {"part": "dcnv3", "name": "copy", "gb_per_s": 3000.0, "bytes": 1 << 31, "ok": True},
        {"part": "dcnv3", "name": "H 192 stage 4", "implementation": "matrix", "ok": False,
         "error": "CheckError: disagrees"},
    )  # fmt: skip
    command = [sys.executable, SESSION / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "- micro-batch 128: out of GPU memory" in text
    assert "| step | ms | 380 | 1500 |" in text
    assert "- dcnv3 at 12 x 12, 1280 channels in 40 groups: matrix kernel" in text
    assert "with DCNv3's gather kernels alone: 1.62" in text
    assert "computed twice: 4.75, 4.50; equal bit for bit: 2 of 2. Peak 40.0 GiB." in text
    assert "| work on the device | ms | 370 | 400 |" in text
    assert "| throughput | images/s | 168 | 42 |" in text
    assert "| gemm tall float | 3 | 100.00 |" in text
    assert "| H 192 stage 1 | both | 2.9 | 1.9 | 1.53 |" in text
    assert "| 320 x 48 forward | 1.600 | 0.300 |" in text
    assert "| weights | **no** | 0.5 | 0.001 |" in text
    assert "CheckError: disagrees" in text
    assert "micro-batch 64: 1500 ms, on the device 400 ms, 33.0 GiB" in done.stdout
    assert {p.name for p in tmp_path.glob("*.png")} == {"planned.png", "kernels.png"}


@pytest.mark.slow
def test_the_audit_tells_what_differs_and_what_is_missing(tmp_path: Path):
    path = [SESSION, ROOT, ROOT / "kernels", ROOT / "tests"]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), "M3I_REHEARSE": "1"}
    command = [sys.executable, "-m", "helpers.gpu_session_checks", "resumed"]
    done = subprocess.run(
        [*command, "offload_resumed"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **environment, "M3I_SESSION": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {row["name"]: row for row in rows}
    assert found["waits for the device in a step"]["figure"] == 8
    assert not found["waits for the device in a step"]["ok"]
    assert found["teacher is its averages in bf16"]["ok"]
    assert found["steps computed twice and equal bit for bit"]["ok"]
    assert found["deterministic: first 1 losses again"]["ok"]
    assert not found["deterministic: resumed with the saved state"]["ok"]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "teacher"):
        assert found[f"offload_optimizer: resumed {kind}"]["differ"] == [f"{kind}/student.w"]
    assert not found["agreement"]["ok"]  # "reference" never ended
    assert "not started" in found["agreement"]["error"]


@pytest.mark.slow
def test_rows_of_what_other_programs_print(tmp_path: Path):
    path = [SESSION, ROOT, ROOT / "kernels", ROOT / "kernels" / "bench", ROOT / "tests"]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), "M3I_REHEARSE": "1"}
    command = [sys.executable, "-m", "helpers.gpu_session_rows", FIRST / "matrix.log"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **environment, "M3I_SESSION": str(tmp_path), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {(row["part"], row["name"]): row for row in rows}
    host = found["host", "160 ranks"]
    assert (host["ranks"], host["ok"], host["ran_on"]) == (160, True, "cuda")
    assert (host["device"], host["config"]) == ("cpu", "configs/a.yaml")
    assert host["commit"] != "z"
    run, kernel = found["step", "micro-batch 4"], found["step", "kernel"]
    assert (run["ok"], run["exit_code"], run["note"]) == (True, 0, "")
    assert (kernel["micro_batch"], kernel["calls"]) == (4, 2)
    plan = found["step", "plan 4"]
    assert 0 < plan["tensors_gib"] < plan["memory_gib"]
    assert plan["images_per_second"] == pytest.approx(4e3 / plan["step_ms"])
    assert plan["hardware_gflops_per_image"] >= plan["gflops_per_image"] > 0
    times = [row for row in rows if row.get("kind") == "time"]
    assert len(times) == 36
    assert all(row.get("ok", True) for row in rows)

    command = [sys.executable, SESSION / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "67 of 67 checks hold, 1.0 to 8.9 times the gather." in text
    assert re.search(r"192 stage 3 \| backward \| 1.977 \| .* \| 8.87 \| 4% \| 34% \|", text)
    assert (tmp_path / "matrix.png").stat().st_size > 0


def test_results_name_no_folder_of_a_machine():
    for path in (SESSION / "results").glob("*/*"):
        if path.suffix != ".png":
            found = set(re.findall(r"/(?:home|work|opt|tmp|root|mnt)/[^\s\"]*", path.read_text()))
            assert not found, path


def test_report_of_nothing(tmp_path: Path):
    command = [sys.executable, SESSION / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr
