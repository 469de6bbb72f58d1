"""Fine-tuning a classifier with the engine: exact resume, any number of ranks, every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.classification import (
    draw_images,
    small_classification,
    train_and_resume_classifier,
    train_classifier,
)
from helpers.ranks import run_ranks
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.config.classification import ClassificationData, LabelledImages
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.tasks import task_of
from m3i_scale.tasks.classification.evaluation import confusion
from m3i_scale.tasks.classification.images import open_images
from m3i_scale.tasks.classification.networks import ClassificationNetworks, Inputs
from m3i_scale.tasks.classification.task import ClassificationTask, mixing, test_transform

test_transform.__test__ = False  # type: ignore[attr-defined]  (no test of pytest's)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def test_every_trained_parameter_has_a_gradient(images, tmp_path):
    spec = small_classification(images, tmp_path).model
    for pooling in ("mean", "attention"):
        networks = ClassificationNetworks(spec.model_copy(update={"pooling": pooling}))
        inputs = Inputs(torch.randn(4, 3, 32, 32), torch.full((4, 3), 1 / 3), torch.arange(4))
        networks(inputs)["loss"].backward()
        for name, parameter in networks.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_loss_is_that_of_soft_targets(images, tmp_path):
    spec = small_classification(images, tmp_path).model
    networks = ClassificationNetworks(spec).eval()
    x, targets = torch.randn(4, 3, 32, 32), torch.rand(4, 3).softmax(1)
    scores = networks(x)["scores"]
    expected = -(targets * scores.log_softmax(1)).sum(1).mean()
    assert torch.allclose(networks(Inputs(x, targets, torch.arange(4)))["loss"], expected)


def test_mixtures_have_targets_that_add_up(images, tmp_path):
    spec = small_classification(images, tmp_path).data.augmentation
    torch.manual_seed(0)
    mixed, targets = mixing(spec, 3)(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert mixed.shape == (4, 3, 8, 8)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    none = spec.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    _, plain = mixing(none, 3)(torch.randn(2, 3, 8, 8), torch.tensor([2, 0]))
    assert plain.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.distributed
def test_a_resumed_run_is_bitwise_the_undisturbed_one(images, tmp_path):
    for result in run_ranks(
        2, train_and_resume_classifier, tmp_path, images=str(images), overrides={}
    ):
        whole, resumed = result["whole"], result["resumed"]
        assert whole["finished"]
        assert resumed["finished"]
        assert whole["evaluation"] == resumed["evaluation"]
        for kind in ("weights", "averages"):
            for name, value in whole[kind].items():
                assert torch.equal(value, resumed[kind][name]), name
    lines = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert 0 <= last["evaluation/top1"] <= last["evaluation/top5"] == 100


@pytest.mark.distributed
def test_ranks_and_stages_train_the_same_weights(images, tmp_path):
    # MixUp depends on which images share a micro-batch; everything else on positions alone.
    plain = {"data.augmentation": {"mixup": 0.0, "cutmix": 0.0}}
    cases = {"one": (1, {}), "two": (2, {}), "stage 1": (2, {"engine.zero": {"stage": 1}})}
    found = {
        name: run_ranks(
            ranks, train_classifier, tmp_path / name, images=str(images), overrides=plain | more
        )[0]
        for name, (ranks, more) in cases.items()
    }
    for name in ("two", "stage 1"):
        for key, value in found["one"]["weights"].items():
            assert torch.allclose(value, found[name]["weights"][key], atol=2e-4), (name, key)
        assert found[name]["evaluation"] == found["one"]["evaluation"]


def test_layers_have_their_own_rates(images, tmp_path):
    task = task_of(small_classification(images, tmp_path))
    networks = task.networks()
    factors = task.rate_factors(networks)
    assert factors == layer_scales(networks, 0.75)
    assert factors["head.weight"] == 1
    assert factors["backbone.patch_embed.proj.weight"] == pytest.approx(0.75**3)


def test_images_of_a_test_have_no_chance_in_them(images):
    data = ClassificationData(
        train=LabelledImages(folder=str(images / "train")),
        test=LabelledImages(folder=str(images / "test")),
        image_size=32,
    )
    found = open_images(data.test, data, 3, test_transform(data))
    assert len(found) == 9
    assert torch.equal(found.load(4).image, found.load(4).image)
    assert [found.load(n).label for n in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"data.train": {"folder": "absent"}}, "data.train: absent cannot be read"),
        ({"model.classes": 4}, "has 3 folders of classes and model.classes is 4"),
        ({"data.class_names": "names"}, "class 'blue' is no line of data.class_names"),
        ({"data.train": {"index": "absent.parquet"}}, "there is no index absent.parquet"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(images, tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("red\ngreen\nviolet\n")
    task = task_of(small_classification(images, tmp_path, overrides))
    with pytest.raises(ConfigError) as caught:
        task.open_stream()
    assert sentence in str(caught.value)


def test_a_damaged_image_is_named(images, tmp_path):
    folder = draw_images(tmp_path / "damaged")
    (folder / "train" / "red" / "0.png").write_bytes(b"no image")
    task = task_of(small_classification(folder, tmp_path))
    dataset = task.open_stream().dataset
    with pytest.raises(BadSample) as caught:
        dataset.load(12)
    assert "red/0.png" in str(caught.value)


def test_a_damaged_test_image_is_counted_and_not_answered(tmp_path, caplog):
    folder = draw_images(tmp_path / "damaged")
    (folder / "test" / "red" / "0.png").write_bytes(b"no image")
    task = task_of(small_classification(folder, tmp_path))
    assert isinstance(task, ClassificationTask)
    networks = ClassificationNetworks(task.config.model).eval()
    world = World(0, 0, 1, torch.device("cpu"))
    tested = confusion(networks, task.test_set, 3, world, batch=4, dtype=torch.float32)
    assert (tested.left_out, int(tested.confusion.sum())) == (1, len(task.test_set) - 1)
    assert tested.top5 == 1.0  # of three classes
    assert "red/0.png" in caplog.text
