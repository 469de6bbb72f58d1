"""The format alone, without DeepSpeed: elastic slices, damage, half-written folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import SHAPES, whole, write
from m3i_scale.config import ConfigError
from m3i_scale.engine import checkpoint
from m3i_scale.engine.checkpoint import CheckpointError, CheckpointReader, extent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_slice_of_a_checkpoint_of_any_number_of_ranks(tmp_path: Path, ranks: int):
    reader = CheckpointReader(write(tmp_path, 7, ranks))
    for name, shape in SHAPES.items():
        expected = whole(name, 7)
        assert torch.equal(reader.tensor("weight", name), expected.reshape(shape))
        for start in range(expected.numel() + 1):
            for stop in range(start, expected.numel() + 1):
                assert torch.equal(reader.slice("weight", name, start, stop), expected[start:stop])
    assert reader.generator_states(ranks - 1)["cpu"].tolist() == [ranks - 1] * 4


@pytest.mark.parametrize("elements", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_extents_cover_everything_once(elements: int, ranks: int):
    covered = [i for r in range(ranks) for i in range(*extent(elements, r, ranks))]
    assert covered == list(range(elements))


def test_only_complete_checkpoints_are_found(tmp_path: Path):
    first, second = write(tmp_path, 1, 2), write(tmp_path, 2, 2)
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000003.partial" / "complete.json").write_text("{}")
    (tmp_path / "step-00000004").mkdir()
    assert checkpoint.complete_checkpoints(tmp_path) == [first, second]
    assert list(checkpoint.candidates(tmp_path, "auto")) == [second, first]
    assert list(checkpoint.candidates(tmp_path, str(first))) == [first]
    assert list(checkpoint.candidates(tmp_path, "never")) == []
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        list(checkpoint.candidates(tmp_path, str(tmp_path / "step-00000004")))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed(tmp_path: Path, damage: str):
    path = write(tmp_path, 1, 2)
    assert checkpoint.verify(path) is None
    victim = path / checkpoint.rank_file(1, 2)
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-7])
    else:
        victim.unlink()
    assert victim.name in str(checkpoint.verify(path))


def test_shares_of_the_check_cover_all_files(tmp_path: Path):
    path = write(tmp_path, 1, 3)
    (path / "state.json").write_text("{}")
    assert [checkpoint.verify(path, r, 2) is None for r in range(2)].count(False) == 1


def test_nothing_in_it_is_pickled(tmp_path: Path):
    path = write(tmp_path, 1, 2)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_a_full_disk_is_reported_and_leaves_the_one_before(tmp_path: Path):
    good = write(tmp_path, 1, 1)
    (tmp_path / "step-00000002.partial").write_text("a file where the folder should be")
    failed = checkpoint.begin_write(tmp_path, 2, 0, 1, {"x": torch.ones(1)}, {})
    failed.thread.join()
    assert failed.failure
    assert checkpoint.complete_checkpoints(tmp_path) == [good]
    assert checkpoint.verify(good) is None


def test_reaching_a_step_again_replaces_its_checkpoint(tmp_path: Path):
    write(tmp_path, 1, 2)
    path = write(tmp_path, 1, 1)
    assert CheckpointReader(path).ranks == 1
    assert checkpoint.verify(path) is None


def test_keep_rule(tmp_path: Path):
    for step in range(1, 8):
        write(tmp_path, step, 1)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=3)
    left = [int(p.name[5:]) for p in checkpoint.complete_checkpoints(tmp_path)]
    assert left == [3, 6, 7]


@pytest.mark.parametrize("format_", [1, 99])
def test_another_format_is_refused(tmp_path: Path, format_: int):
    path = write(tmp_path, 1, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": format_}))
    with pytest.raises(
        CheckpointError, match=f"format {format_}, this version reads 2; train on with the version"
    ):
        CheckpointReader(path)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {},
        None,
        [{"file": "/dev/zero"}],
        [{"file": "rank-00000-of-00001.safetensors"}, {"file": "/dev/zero"}],
        [{"file": "state.json"}],
    ],
    ids=str,
)
def test_a_marker_that_lists_other_files_opens_none_of_them(tmp_path: Path, files: object):
    path = write(tmp_path, 1, 1)
    (path / "complete.json").write_text(json.dumps({"files": files}))
    assert checkpoint.verify(path)


@pytest.mark.parametrize("name", ["complete.json", "state.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", '{"files": 1e400}', "\0"])
def test_records_of_any_shape(tmp_path: Path, name: str, text: str):
    path = write(tmp_path, 1, 1)
    (path / name).write_text(text)
    assert checkpoint.verify(path)
    if name == "state.json":
        with pytest.raises(CheckpointError):
            CheckpointReader(path)


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 0}, {"ranks": "2"}, {"ranks": True}, {"step": 7}, {"step": None}, {"step": -1},
        {"shapes": []}, {"shapes": {"a.weight": "x"}}, {"shapes": {"a.weight": [10**30]}},
        {"buffers": 3}, {"adam_step": 0.5}, {"position": 2**64},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_cannot_be(tmp_path: Path, change: dict[str, object]):
    path = write(tmp_path, 1, 2)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointReader(path)


def test_tensors_of_another_length_are_not_spread_over_a_parameter(tmp_path: Path):
    path = write(tmp_path, 1, 1)
    state = json.loads((path / "state.json").read_text())
    state["shapes"]["a.bias"] = [40]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="has the shape"):
        CheckpointReader(path).slice("weight", "a.bias", 0, 1)
    with pytest.raises(CheckpointError, match="no tensor named"):
        CheckpointReader(path).tensor("weight", "nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointReader(path).tensor("exp_avg", "a.weight")
