from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.small import SMALL
from m3i_scale.config import ConfigError, dump_config, load_config
from m3i_scale.paths import expand, literal, require_writable
from m3i_scale.sweep.spec import load_sweep


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / "scratch"


def test_home_and_variables(scratch: Path):
    home = os.environ["HOME"]
    assert expand("~/a") == f"{home}/a"
    assert expand("~") == home
    assert expand("$SCRATCH/a") == expand("${SCRATCH}/a") == f"{scratch}/a"
    assert expand("s3://b/$SCRATCH") == f"s3://b/{scratch}"
    for same in ("a/b", "a~b", "./~", "a/~/b", "pipe:cat $HOME/x ~/y", "a$", "a$1", "s3://b/k"):
        assert expand(same) == same


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$NOWHERE/a", "NOWHERE is not set"),
        ("a/${NOWHERE}", "NOWHERE is not set"),
        ("$EMPTY/a", "EMPTY is empty"),
        ("${SCRATCH:-x}", "write $NAME or ${NAME}"),
        ("~no-such-user/a", "no user 'no-such-user'"),
    ],
)
def test_what_cannot_be_expanded_is_named(text: str, words: str):
    with pytest.raises(ValueError, match=words.replace("$", r"\$").replace("{", r"\{")) as caught:
        expand(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("path", ["/a/$b", "a$$b", "/a/${c}", "plain", "pipe:cat $x"])
def test_an_expanded_path_is_not_expanded_again(path: str):
    assert expand(literal(path)) == path


def test_every_path_of_a_configuration_is_expanded_once(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.setenv("ODD", "/data/$b")
    changes = [
        "folder=~/runs",
        "data.sources.0.index=$SCRATCH/i.parquet",
        "data.storage.cache=$ODD",
        "model.text.tokenizer=${SCRATCH}/t.json",
    ]
    config = load_config(str(tmp_path / "small.yaml"), changes)
    assert config.run_folder == tmp_path / "home" / "runs" / "small"
    assert config.data.sources[0].index == f"{scratch}/i.parquet"
    assert config.data.storage.cache == "/data/$b"
    assert config.model.text is not None
    assert config.model.text.tokenizer == f"{scratch}/t.json"
    (tmp_path / "again.yaml").write_text(dump_config(config))
    monkeypatch.delenv("SCRATCH")
    assert load_config(tmp_path / "again.yaml") == config
    assert f"{scratch}/i.parquet" in dump_config(config)


def test_a_variable_that_is_not_set_is_blamed_on_the_setting(tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.index: .*NOWHERE is not set"):
        load_config(tmp_path / "small.yaml", ["data.sources.0.index=$NOWHERE/i.parquet"])


def test_names_of_files_are_expanded(tmp_path: Path, scratch: Path):
    scratch.mkdir()
    (tmp_path / "home").mkdir()
    (scratch / "small.yaml").write_text(SMALL)
    (tmp_path / "home" / "top.yaml").write_text("base: $SCRATCH/small.yaml\nrun: top")
    assert load_config("~/top.yaml", over=["$SCRATCH/small.yaml"]).run == "small"
    assert load_config("~/top.yaml").run == "top"
    (tmp_path / "home" / "top.yaml").write_text("seed: 1\nbase: $NOWHERE/small.yaml")
    with pytest.raises(ConfigError, match=r"top\.yaml:2: base: .*NOWHERE is not set"):
        load_config("~/top.yaml")
    (tmp_path / "home" / "sweep.yaml").write_text(
        "{name: s, folder: $SCRATCH/s, config: $SCRATCH/small.yaml, samples: 1e3, seeds: [0],"
        " axes: {a: [{name: x, config: ~/x.yaml}]}, evaluation: {queries: ~/q.parquet}}"
    )
    sweep = load_sweep("~/sweep.yaml")
    home = tmp_path / "home"
    assert (sweep.folder, sweep.config) == (f"{scratch}/s", [f"{scratch}/small.yaml"])
    assert (sweep.axes["a"][0].config, sweep.evaluation.queries) == (
        [f"{home}/x.yaml"], [f"{home}/q.parquet"])  # fmt: skip


@pytest.mark.parametrize("run", ["", "a//b", "/a", "../a", "a/..", "~/a", "$SCRATCH", "a\nb"])
def test_a_run_is_named_and_not_placed(tmp_path: Path, run: str):
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(ConfigError, match="cannot name a run"):
        load_config(tmp_path / "small.yaml", [f'run="{run}"'.replace("\n", "\\n")])


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path):
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/x: nothing can be written there \(Not a directory"):
        require_writable(tmp_path / "file" / "x")


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "tempfile.TemporaryFile",
        lambda dir: open("/dev/full", "wb", buffering=0),  # noqa: SIM115
    )
    with pytest.raises(ValueError, match="No space left on device"):
        require_writable(tmp_path)
