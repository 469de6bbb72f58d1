"""The benchmark's command line: compilation without a GPU, and its refusals."""

import csv
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from helpers.kernel_checks import DEVICE

BENCH = pathlib.Path(__file__).parents[2] / "kernels" / "bench"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "run.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )


def import_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import `run.py`, which turns the interpreter off, and leave the process as it was."""
    for operator in ("block_mix", "dcnv3", "depthwise", "photometric"):  # interpreted, if at all
        importlib.import_module(f"m3i_kernels.{operator}.op")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    importlib.import_module("run")


@pytest.mark.slow
@pytest.mark.cpu_only
def test_kernels_compile_for_every_target_without_spills(tmp_path: pathlib.Path) -> None:
    chosen = ("bfloat16 forward", "bfloat16 backward", "bfloat16 channels_last")
    done = run("--static", "--problems", *chosen, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "static.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["operator"] for r in rows} == {"dcnv3", "depthwise", "block_mix", "photometric"}
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        assert int(row["spilled_bytes"]) == 0, row
        assert 0 < int(row["registers"]) <= 512, row
        assert int(row["instructions"]) > 50, row
        assert float(row["requested_bytes"]) > float(row["minimal_bytes"]) > 0, row


@pytest.mark.slow
def test_matrix_kernels_stay_within_their_instructions() -> None:
    """At 12 x 12: at most 50 instructions a result forward and 110 backward, nothing spilled."""
    pytest.importorskip("triton", "3.8", reason="the matrix kernels need Triton 3.8")
    done = subprocess.run(
        [sys.executable, BENCH / "matrix_check.py", "--static", "--problems", "192 stage 3"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        limit = {"forward": 50, "backward": 110}[row["direction"]]
        assert 20 < row["instructions_per_result"] <= limit, row
        assert row["spilled_bytes"] == 0, row


def test_a_spilling_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import static

    good = static.StaticCount("op", "c", "k", "sm_90", 4, 255, 0, 100, 900, 90.0, 2.0, 1.0)
    assert static.problems([good]) == []
    assert "spills 8 bytes" in static.problems([good._replace(spilled_bytes=8)])[0]
    crowded = good._replace(target="gfx942", shared_bytes=65 << 10)
    assert "shared memory" in static.problems([crowded])[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_says_that_there_is_no_gpu(tmp_path: pathlib.Path) -> None:
    done = run("--op", "dcnv3", "--out", tmp_path)
    assert done.returncode == 2
    assert "There is no GPU here" in done.stderr
    assert "--static" in done.stderr


def test_refuses_what_disagrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import measure
    import operators

    operator = operators.OPERATORS["dcnv3"]
    shape = {"size": 3, "channels": 32, "groups": 2, "gated": True}
    problem = operators.Problem("small", torch.bfloat16, shape)
    good = operator.implementations(problem)["reference eager"]
    assert measure.check(operator, problem, good, "good", DEVICE.type) < 1e-2
    with pytest.raises(measure.CheckError, match=r"dcnv3 wrong on small: .* not timed"):
        measure.check(operator, problem, lambda **t: 1.1 * good(**t), "wrong", DEVICE.type)


def test_an_implementation_that_raises_has_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    import_command(monkeypatch)
    import measure
    import operators
    import run as command

    def timed(operator: object, problem: object, *rest: object) -> list[measure.Timing]:
        if "triton" in rest:
            raise RuntimeError("no kernel image\nfor this device")
        row = measure.failure(operator, problem, 2, "reference eager", "cpu", ValueError())
        return [row._replace(failed="", direction="forward", fraction_of_copy=0.5)]

    monkeypatch.setattr(measure, "measure", timed)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(
        measure,
        "provenance",
        lambda device: dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x"),
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    options = command._parser().parse_args(
        ["--problems", "H 192 stage 4", "--implementations", "triton", "reference eager",
         "--out", str(tmp_path)])  # fmt: skip
    assert command.run_operator(operators.OPERATORS["dcnv3"], options) == 1
    with (tmp_path / "dcnv3_bf16.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["implementation"] for r in rows] == ["triton", "reference eager"]
    assert rows[0]["failed"] == "RuntimeError: no kernel image for this device"
    assert rows[1]["failed"] == ""


def test_official_operators_are_compared_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_command(monkeypatch)
    import external
    import operators
    import run as command

    monkeypatch.setattr(external, "dcn_operators", lambda *_: {"official DCNv3": None})
    options = command._parser().parse_args(["--problems", "H 192 stage 4"])
    cases = list(command._cases(operators.OPERATORS["dcnv3"], options))
    official = [p.dtype for p, name in cases if name == "official DCNv3"]
    assert official == [torch.float16]
    assert [p.dtype for p, name in cases if name == "triton"] == [torch.bfloat16, torch.float16]


def test_roofline_counts_every_described_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """From recorded launches: threads, bytes and trips; instructions where it is cheap."""
    monkeypatch.syspath_prepend(str(BENCH))
    import compile_only
    import roofline
    import static

    names = ("H G bfloat16 forward", "H G bfloat16 backward", "320 bfloat16 forward",
             "320 bfloat16 backward")  # fmt: skip
    if not isinstance(static.dcnv3_op.dcnv3_forward_kernel, compile_only.triton.JITFunction):
        pytest.skip("kernels are interpreted in this process")
    launches = [x for c in static.configurations() if c.name in names for x in c.launches()]
    assert {x.kernel.__name__ for x in launches} == roofline.DESCRIBED
    for launch in launches:
        assert roofline._threads(launch) > 0
        assert roofline._l1_bytes(launch) > 0
        assert roofline.trips(launch.arguments, launch.kernel.__name__) >= 1


def test_against_refuses_what_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_command(monkeypatch)
    import run as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["--against", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is no checkout" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dcnv3", "dcnv3_plain", "depthwise", "block_mix", "photometric"])
def test_every_operator_passes_its_own_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped implementation on the smallest problem, as the benchmark would run it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import measure
    import operators

    operator = operators.OPERATORS[name]
    problem = next(iter(operator.problems(2, torch.bfloat16)))
    small = {
        "dcnv3": {"size": 2},
        "dcnv3_plain": {"size": 2},
        "depthwise": {"size": 2},
        "block_mix": {"size": 32},
    }
    shape = problem.shape | small.get(name, {"size": 16})
    problem = problem._replace(shape=shape)
    shipped = operator.implementations(problem)["triton"]
    limit = operator.tolerance(torch.bfloat16) * (3 if DEVICE.type == "cpu" else 1)
    monkeypatch.setattr(type(operator), "tolerance", lambda self, dtype: limit)
    measure.check(operator, problem, shipped, "triton", DEVICE.type)
    inputs = operator.inputs(problem, 2, DEVICE.type)
    assert operator.minimal_bytes(inputs, 8, "forward") > sum(t.nbytes for t in inputs.values())
