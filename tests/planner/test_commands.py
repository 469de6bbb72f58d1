"""`m3i plan`: what it prints, what it says when a run does not fit, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.small import SMALL
from m3i_scale import cli


@pytest.fixture
def config(tmp_path: Path) -> str:
    tree = yaml.safe_load(SMALL)
    tree["model"]["backbone"]["options"]["depths"] = [1, 1, 2, 1]
    tree["optimizer"] |= {"global_batch_size": 4096, "max_micro_batch": 256}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def plan(*words: str) -> int:
    return cli.main(["plan", *words])


def test_prints_a_plan_and_draws_a_sweep(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert plan("--config", config, "--nodes", "2", "--sweep", "8,16,32", "--out", str(out)) == 0
    text = capsys.readouterr().out
    for words in ("moments", "reduce-scatter, gradients", "It fits", "6 steps", "assumed"):
        assert words in text
    assert (out / "plan.txt").read_text() == text
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_compares_the_stages_and_names_the_fastest_that_fits(
    config: str, capsys: pytest.CaptureFixture[str]
):
    assert plan("--config", config, "--nodes", "2") == 0
    text = capsys.readouterr().out
    lines = text[text.index("engine.zero.stage ") :].splitlines()
    rows = [line.split() for line in lines[1:5]]
    assert [row[:2] for row in rows] == [
        ["1", "whole"], ["2", "whole"], ["3", "whole"], ["3", "sharded"]
    ]  # fmt: skip
    assert [row[8:] for row in rows] == [[], [], ["as", "configured"], []]
    seconds = [float(row[7]) for row in rows]  # small networks: Python is the limit
    assert seconds[0] < seconds[2] < seconds[3]
    assert "Fastest of those that fit: engine.zero.stage=1 engine.teacher=whole;" in lines[5]


def test_a_stage_that_does_not_fit_is_not_the_fastest(
    config: str, capsys: pytest.CaptureFixture[str]
):
    # Two buckets of this size stay within a GPU at stage 3, which has one, and not at stage 1.
    bucket = "engine.zero.reduce_bucket=15_000_000_000"
    assert plan("--config", config, "engine.zero.stage=1", bucket, "engine.precision=fp32") == 0
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "Fastest of those that fit: engine.zero.stage=3" in text
    assert "What would fit: engine.zero.stage=3;" in text


def test_says_when_it_does_not_fit_and_what_would(config: str, capsys: pytest.CaptureFixture[str]):
    huge = (
        "data.image_size=1024",
        "optimizer.max_micro_batch=512",
        "optimizer.global_batch_size=4096",
    )
    assert plan("--config", config, "--gpu", "a100-40", *huge) == 0
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    advice = text.split("optimizer.max_micro_batch=")[1].split(";")[0].split(".")[0]
    assert plan("--config", config, "--gpu", "a100-40", *huge[::2],
                f"optimizer.max_micro_batch={advice}") == 0  # fmt: skip
    assert "It fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "did you mean h100"),
        (["--nodes", "3"], "cannot be spread over 24 ranks"),
        (["--nodes", "3"], "(ranks are --nodes 3 x --gpus-per-node 8)"),
        (["--sweep", "8,24"], "(ranks are --nodes 3 x --gpus-per-node 8)"),
        (["--sweep", "8,12"], "12 GPUs are no whole nodes"),
        (["optimizer.duration=3 epochs"], "--samples"),
    ],
)
def test_refuses_in_one_sentence(
    config: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert plan("--config", config, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().splitlines()[-1].startswith("error: ")
