"""What a checkpoint states about order, samples and loss, and what a change of it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m3i_scale.config import Config, ConfigError
from m3i_scale.engine.agreement import require_agreement
from m3i_scale.engine.schedules import split_batch
from m3i_scale.tasks.pretraining import Pretraining

IDENTITIES = [{"samples": 10, "content": "ab"}, {"samples": 20, "content": "cd"}]
CHECKPOINT = Path("runs/x/checkpoints/step-00000003")


def stated(tree: dict[str, Any], identities: Any = IDENTITIES) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    return json.loads(json.dumps(Pretraining(Config.model_validate(tree)).statement(identities)))


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(tree))
    node = copy
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    return copy


CHANGES = [
    ("seed", 7, "seed was 0 and is 7"),
    ("optimizer.global_batch_size", 16, "optimizer.global_batch_size was 8 and is 16"),
    ("data.lanes", 4, "data.lanes was 8 and is 4"),
    ("data.chunk_mebibytes", 1.0, "data.chunk_mebibytes was 4.0 and is 1.0"),
    ("data.image_size", 32, "data.image_size was 64 and is 32"),
    ("data.mean", [0.5, 0.5, 0.5], "data.mean was"),
    ("data.augmentation.scale", [0.5, 1.0], "data.augmentation.scale was"),
    ("data.augmentation.view_b", {"hue": 0.2}, "data.augmentation.view_b.hue was 0.1 and is 0.2"),
    ("data.sources.1.epochs", 2.0, "data.sources.1.epochs was 1.0 and is 2.0"),
    ("objective.targets.0.normalise", "none", "objective.targets.image_i.normalise was"),
    ("objective.input.ratio", 0.25, "objective.input.ratio was"),
]


@pytest.mark.parametrize(("key", "value", "phrase"), CHANGES)
def test_a_change_is_refused_with_key_and_both_values(small_tree, key, value, phrase):
    old, new = stated(small_tree), stated(changed(small_tree, key, value))
    with pytest.raises(ConfigError) as caught:
        require_agreement(CHECKPOINT, old, new, [])
    assert phrase in str(caught.value)
    assert str(CHECKPOINT) in str(caught.value)
    accept = str(caught.value).rpartition("--accept-change ")[2].split(",")
    assert any(phrase in said for said in require_agreement(CHECKPOINT, old, new, accept))


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer.learning_rate", 1e-5), ("optimizer.duration", "9 steps"), ("data.workers", 3),
     ("optimizer.max_micro_batch", 2), ("data.sources.0.index", "moved/texts.parquet"),
     ("data.sources.0.name", "renamed"), ("checkpoint.keep_last", 1)],
)  # fmt: skip
def test_what_the_order_does_not_depend_on_may_change(small_tree, key, value):
    old, new = stated(small_tree), stated(changed(small_tree, key, value))
    assert require_agreement(CHECKPOINT, old, new, []) == []


def test_another_index_under_the_same_name_is_refused(small_tree):
    other = [IDENTITIES[0], {"samples": 20, "content": "ef"}]
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.index\.content was 'cd' and is 'ef'"):
        require_agreement(CHECKPOINT, stated(small_tree), stated(small_tree, other), [])


def test_a_target_more_or_less_is_refused(small_tree):
    fewer = json.loads(json.dumps(small_tree))
    fewer["objective"]["targets"].pop()
    with pytest.raises(ConfigError, match=r"category_j.* is 'absent'"):
        require_agreement(CHECKPOINT, stated(small_tree), stated(fewer), [])


def test_one_accepted_key_does_not_accept_another(small_tree):
    new = stated(changed(changed(small_tree, "seed", 7), "optimizer.global_batch_size", 16))
    with pytest.raises(ConfigError) as caught:
        require_agreement(CHECKPOINT, stated(small_tree), new, ["seed"])
    assert "seed was" not in str(caught.value)
    assert "--accept-change data.lanes,optimizer.global_batch_size" in str(caught.value)


def test_a_misspelt_key_is_refused(small_tree):
    with pytest.raises(ConfigError, match="--accept-change sed: there is no such key"):
        require_agreement(CHECKPOINT, stated(small_tree), stated(small_tree), ["sed"])


def test_a_checkpoint_that_states_nothing_is_read_and_that_is_said(small_tree):
    (said,) = require_agreement(CHECKPOINT, None, stated(small_tree), [])
    assert "nothing could be compared" in said


@pytest.mark.parametrize("without", [False, True])
def test_another_number_of_candidates_is_said_with_both(small_tree, without):
    small_tree["optimizer"] |= {"global_batch_size": 16, "max_micro_batch": 8}
    if without:
        targets = [
            t for t in small_tree["objective"]["targets"] if t["representation"] == "features"
        ]
        small_tree["objective"] |= {"targets": targets, "balance": None}
    task, state = Pretraining(Config.model_validate(small_tree)), {"ranks": 2, "candidates": 16}
    said = task.moved(state, split_batch(16, 8, 1), 1)
    assert said is not None
    assert "of 2 ranks and this run has 1" in said
    assert ("8 candidates instead of 16" in said) != without
    assert task.moved(state, split_batch(16, 8, 2), 2) is None
