"""Detection under the engine: resuming, ranks, faults before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import coco as small
from helpers.ranks import run_ranks
from m3i_scale.config import ConfigError
from m3i_scale.data.map_stream import Placed
from m3i_scale.tasks import task_of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    small.write(folder, small.content(6))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["vit", "composite"])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(images, tmp_path, name):
    found = run_ranks(2, small.train_and_resume_detector, tmp_path, images=str(images), name=name)
    for result in found:
        whole, resumed = result["whole"], result["resumed"]
        assert whole["finished"]
        assert resumed["finished"]
        assert whole["evaluation"] == resumed["evaluation"]
        for key, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][key]), key
    assert found[0]["whole"]["evaluation"] == found[1]["whole"]["evaluation"]
    folder = tmp_path / "small"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    kinds = ["box", "mask"] if name == "vit" else ["box"]
    assert all(0 <= last[f"evaluation/{kind}_AP"] <= 100 for kind in kinds)
    assert isinstance(json.loads((folder / "detections.json").read_text()), list)
    for picture in ("detections", "mistakes", "precision_recall"):
        assert min(Image.open(folder / f"{picture}.png").size) > 100


def test_what_the_networks_draw_depends_on_seed_and_sample(images, tmp_path):
    task = task_of(small.small_detection(images, tmp_path, "dino"))
    networks = task.networks().train()
    stream = task.open_stream()
    world = small.World(0, 0, 1, torch.device("cpu"))
    samples = [stream.dataset.load(i) for i in (0, 2)]
    losses = []
    for position in (7, 7, 8):
        torch.manual_seed(len(losses))
        placed = Placed(stream.dataset.collate(samples), torch.tensor([position, position + 1]))
        inputs = task.prepare(placed, world)
        losses.append(task.forward(networks, inputs)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_rates_follow_the_configuration(images, tmp_path):
    overrides = {"optimizer.deformation_factor": 0.1, "optimizer.sampling_factor": 0.01}
    task = task_of(small.small_detection(images, tmp_path, "dino", overrides))
    factors = task.rate_factors(task.networks())
    assert factors["backbone.levels.3.blocks.0.dcn.offset.weight"] == pytest.approx(0.075)
    assert factors["decoder.layers.0.encoder_attn.sampling_offsets.weight"] == 0.01
    assert factors["proposal.0.weight"] == 1


@pytest.mark.parametrize("name", small.DETECTORS)
def test_the_work_of_a_backbone_is_counted(images, tmp_path, name):
    task = task_of(small.small_detection(images, tmp_path, name))
    doubled = {"data.resize": {"kind": "jitter", "size": 128}}
    larger = task_of(small.small_detection(images, tmp_path, name, doubled))
    assert 3.5 < larger.flops() / task.flops() < 6


def test_two_backbones_are_twice_the_work(images, tmp_path):
    one, two = (
        task_of(small.small_detection(images, tmp_path, name)).flops()
        for name in ("dino", "composite")
    )
    assert 1.5 < two / one < 3


def test_weights_of_pretraining_fit_both_backbones(images, tmp_path):
    task = task_of(small.small_detection(images, tmp_path, "composite"))
    names = task.initial_names(["levels.0.norm.0.weight", "clip_projector.norm.weight"])
    assert names == {
        "backbone.levels.0.norm.0.weight": "levels.0.norm.0.weight",
        "backbone.second.0.norm.0.weight": "levels.0.norm.0.weight",
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model.categories": 80}, "has 3 categories and model.categories is 80; set it to 3"),
        ({"data.train": {"annotations": "absent.json", "images": "x"}}, "data.train: absent.json"),
        ({"data.val": {"annotations": "other.json", "images": "x"}}, "data.val: other.json has"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(images, tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    content = small.content(6)
    content["categories"][0]["name"] = "bowl"
    Path("other.json").write_text(json.dumps(content))
    task = task_of(small.small_detection(images, tmp_path, "vit", overrides))
    with pytest.raises(ConfigError) as caught:
        task.open_stream()
    assert sentence in str(caught.value)


def test_a_validation_set_without_annotations_is_named_before_the_first_step(tmp_path, caplog):
    content = small.content(6)
    small.write(tmp_path, content)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(content | {"annotations": []}))
    sets = {"annotations": str(bare), "images": str(tmp_path / "images")}
    task = task_of(small.small_detection(tmp_path, tmp_path, "vit", {"data.val": sets}))
    with caplog.at_level("WARNING"):
        task.open_stream()
    assert "bare.json has no annotation to compare with" in caplog.text


def test_what_is_left_out_is_logged(tmp_path, caplog):
    content = small.content(6)
    content["annotations"][0]["category_id"] = 77
    small.write(tmp_path, content)
    task = task_of(small.small_detection(tmp_path, tmp_path, "vit"))
    with caplog.at_level("WARNING"):
        task.open_stream()
    assert "data.train: left out 1 unknown category: annotation 7 of image 100" in caplog.text
    assert "data.val: left out 1 unknown category" in caplog.text
