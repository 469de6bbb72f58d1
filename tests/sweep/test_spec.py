from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.sweeps import GRID, write_sweep
from m3i_scale.config import ConfigError
from m3i_scale.sweep.spec import load_sweep

ONE, TWO = {"name": "one"}, {"name": "two"}


def test_numbers_are_names_and_one_file_needs_no_list(tmp_path: Path):
    sweep = load_sweep(write_sweep(tmp_path))
    assert [variant.name for variant in sweep.axes["gamma"]] == ["0.5", "one"]
    assert sweep.config == ["small.yaml"]
    assert sweep.evaluation.queries == [str(tmp_path / "heldout.parquet")]


def test_files_start_from_others_and_overrides_come_last(tmp_path: Path):
    write_sweep(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("base: sweep.yaml\nname: child\nsamples: 99\n")
    sweep = load_sweep(child, ["evaluation.neighbours=3", "seeds=[7]"])
    assert (sweep.name, sweep.samples, sweep.seeds) == ("child", 99, [7])
    assert sweep.evaluation.neighbours == 3
    assert sweep.axes == load_sweep(tmp_path / "sweep.yaml").axes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampels": 3}, "unknown key 'sampels'; did you mean 'samples'?"),
        ({"evaluation": {"queries": "x", "probes": 1}}, "did you mean 'probe'?"),
        ({"evaluation": {"queries": []}}, "evaluation.queries"),
        ({"axes": {"a": [{**ONE, "configs": "x"}]}}, "'axes.a.0.configs'; did you mean 'config'?"),
        ({"axes": {"a": [ONE, TWO, ONE]}}, "axis 'a' has two variants named 'one'"),
        ({"axes": {"a": []}}, "axis 'a' has no variant"),
        ({"axes": {}}, "axes"),
        ({"axes": {"a": [{"name": "a/b"}]}}, "'a/b' becomes part of a file name"),
        ({"name": "../up"}, "'../up' becomes part of a file name"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is there twice"),
        ({"seeds": []}, "seeds"),
        ({"samples": 0}, "samples"),
        ({"set": ["seed=3"]}, "seed is set by the sweep"),
        ({"axes": {"a": [{**ONE, "set": ["optimizer.duration=9 steps"]}]}}, "equal|same for all"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as caught:
        load_sweep(write_sweep(tmp_path, **changes))
    message = str(caught.value)
    assert any(word in message for word in words.split("|")), message
    assert "\n" not in message


def test_missing_keys_are_named(tmp_path: Path):
    for key in ("name", "config", "samples", "seeds", "axes", "evaluation"):
        file = tmp_path / "x.yaml"
        file.write_text(str({k: v for k, v in GRID.items() if k != key}))
        with pytest.raises(ConfigError, match=f"missing key '{key}'"):
            load_sweep(file)
