"""Segmentation with the engine: exact resume, any number of ranks, what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.segmentation import (
    MASK2FORMER,
    draw_squares,
    small_segmentation,
    train_and_resume_segmenter,
    train_segmenter,
)
from m3i_scale.config import ConfigError
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.tasks import task_of

LARGER = {
    "data.crop": 64,
    "data.augmentation": {"short_side": 64, "long_side": 128},
    "evaluation": {"short_side": 64, "long_side": 128, "pictures": 2},
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_squares(tmp_path_factory.mktemp("squares"))


@pytest.mark.distributed
@pytest.mark.parametrize("head", [None, MASK2FORMER], ids=["upernet", "mask2former"])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    squares: Path, tmp_path: Path, head: dict[str, Any] | None
):
    overrides = {} if head is None else {"model.head": head, **LARGER}
    for result in run_ranks(
        2, train_and_resume_segmenter, tmp_path, squares=str(squares), overrides=overrides
    ):
        whole, resumed = result["whole"], result["resumed"]
        assert whole["finished"]
        assert resumed["finished"]
        assert whole["evaluation"] == resumed["evaluation"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), name
    lines = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert 0 <= last["evaluation/mIoU"] <= 100
    assert last["evaluation/images"] == 3
    folder = tmp_path / "small" / "evaluation"
    table = json.loads((folder / "segmentation.json").read_text())
    assert set(table["classes"]) == {"0", "1", "2"}
    assert {path.name for path in folder.glob("*.png")} == {
        "predictions.png",
        "worst.png",
        "confusion.png",
    }


@pytest.mark.distributed
def test_ranks_and_stages_train_the_same_weights(squares: Path, tmp_path: Path):
    """Augmentation, loss, stochastic depth and dropout are those of the samples.

    One rank at stage 3, two at stage 1.
    """
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"optimizer.max_micro_batch": 2}),
        "two": (2, {"engine.zero": {"stage": 1}}),
    }
    found = {
        name: run_ranks(
            ranks, train_segmenter, tmp_path / name, squares=str(squares), overrides=more
        )[0]
        for name, (ranks, more) in cases.items()
    }
    for key, value in found["one"]["weights"].items():
        assert torch.allclose(value, found["two"]["weights"][key], atol=2e-4), key
    accuracy = [run["evaluation"]["evaluation/pixel_accuracy"] for run in found.values()]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.01)


def test_rates_statement_and_cost(squares: Path, tmp_path: Path):
    task = task_of(small_segmentation(squares, tmp_path))
    networks = task.networks()
    assert task.rate_factors(networks) == layer_scales(networks, 0.75)
    stream = task.open_stream()
    stated = task.statement(stream.identities())
    changed = task_of(small_segmentation(squares, tmp_path, {"data.zero_is_unlabelled": True}))
    other = changed.statement(stream.identities())
    assert {key for key in stated if stated[key] != other[key]} == {"data.zero_is_unlabelled"}
    assert stated["data.train.samples"] == 6
    assert stated["model.head.kind"] == "upernet"
    assert task.flops() > 0
    assert task.evaluation is not None
    without = small_segmentation(squares, tmp_path)
    without = without.model_copy(update={"data": without.data.model_copy(update={"test": None})})
    assert task_of(without).evaluation is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"data.train": {"images": "absent", "masks": "absent"}}, "data.train.images: absent"),
        ({"data.test": {"images": "absent", "masks": "absent"}}, "data.test.images: absent"),
        ({"data.class_names": "names"}, "has 2 names and model.classes is 3"),
        ({"model.head.norm": "sync_batch"}, "works on GPUs only"),
    ],
)
def test_what_cannot_be_used_is_refused_before_training(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: Any, sentence: str
):
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("wall\nsky\n")
    task = task_of(small_segmentation(squares, tmp_path, overrides))
    with pytest.raises(ConfigError) as caught:
        task.open_stream()
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"evaluation.mode": "window", "evaluation.stride": 33}, "would leave gaps"),
        ({"model.classes": 255, "data.zero_is_unlabelled": True}, "use fewer classes"),
        ({"model.classes": 256}, "less than or equal to 255"),
        ({"data.augmentation.scale": [2.0, 0.5]}, "runs backwards"),
        ({"data.augmentation.long_side": 16}, "is above long_side"),
    ],
)
def test_impossible_configurations(squares: Path, tmp_path: Path, overrides: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        small_segmentation(squares, tmp_path, overrides)
