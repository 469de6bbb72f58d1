"""A linear probe: what is frozen, its features on disk, and LARS where ZeRO has split weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.optim.lars import Lars
from torch.nn import functional as F

from helpers.classification import (
    draw_images,
    small_classification,
    train_and_resume_classifier,
    train_classifier,
)
from helpers.ranks import run_ranks
from m3i_scale.cluster.launch import World, drawing
from m3i_scale.config import ConfigError
from m3i_scale.config.classification import Classification
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.order import hash64
from m3i_scale.engine import session
from m3i_scale.engine.checkpoint import CheckpointError
from m3i_scale.engine.memory import FROZEN as FROZEN_NETWORKS
from m3i_scale.engine.memory import MOMENTS
from m3i_scale.engine.schedules import make_schedule
from m3i_scale.engine.stop import StoppedEarly
from m3i_scale.models.backbone import build_backbone
from m3i_scale.planner.estimate import Cluster, make_plan
from m3i_scale.planner.gpus import gpu
from m3i_scale.tasks import task_of
from m3i_scale.tasks.classification import features
from m3i_scale.tasks.classification.probe import ProbeTask, pool
from m3i_scale.tasks.classification.task import training_transform

ALONE = World(0, 0, 1, torch.device("cpu"))
PLAIN = {"rand_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
FROZEN: dict[str, Any] = {
    "model.frozen": True, "optimizer.layer_decay": 1.0, "optimizer.average": None,
    "data.augmentation": PLAIN,
}  # fmt: skip
LARS = {
    "optimizer.kind": "lars", "optimizer.learning_rate": 3.2, "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.1, "optimizer.clip_norm": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def cached(folder: Path, **more: Any) -> dict[str, Any]:
    return FROZEN | {"data.features": {"folder": str(folder / "features"), "batch": 4, **more}}


def probe(images: Path, folder: Path, overrides: dict[str, Any]) -> ProbeTask:
    task = task_of(small_classification(images, folder, overrides))
    assert isinstance(task, ProbeTask)
    return task


def computed(task: ProbeTask, stopping: Any = lambda: False) -> features.CachedSet:
    """The training set of a task whose features are on disk."""
    found = task.open_stream().dataset
    task.load_frozen(ALONE.device)
    task.precompute(ALONE, stopping)
    assert isinstance(found, features.CachedSet)
    return found


def files(folder: Path) -> dict[str, int]:
    """Files of all caches, and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("features/*/*.safetensors")}


# -------------------------------------------------------------------------------- what is frozen


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_the_classifier_sees_features_of_the_weights_that_init_names(images, tmp_path, pooling):
    config = small_classification(images, tmp_path)
    torch.manual_seed(5)
    backbone = build_backbone("vit", **config.model.backbone.options).eval()
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    init = {"model.init": str(tmp_path / "weights.safetensors"), "model.pooling": pooling}
    task = probe(images, tmp_path, FROZEN | init)
    task.load_frozen(ALONE.device)
    networks, x = task.networks().train(), torch.randn(4, 3, 32, 32)
    assert {name for name, _ in networks.named_parameters()} == {"head.weight", "head.bias"}
    found = pool(backbone, x, attention=pooling == "attention")
    expected = networks.head(F.layer_norm(found, found.shape[1:], eps=1e-6))
    assert torch.equal(networks(x)["scores"], expected)


# ------------------------------------------------------------------------------ features on disk


def test_features_on_disk_are_those_of_the_images_bit_for_bit(images, tmp_path):
    task = probe(images, tmp_path, cached(tmp_path, standardise=False))
    found = computed(task)
    live = probe(images, tmp_path, FROZEN)
    live.load_frozen(ALONE.device)
    backbone = live.networks().frozen["backbone"]
    set_of = task._train_features.images
    for start in range(0, len(set_of), 4):
        rows = range(start, min(start + 4, len(set_of)))
        batch = set_of.collate([set_of.load(row) for row in rows])
        stored = found.collate([found.load(row) for row in rows])
        assert torch.equal(stored.images, pool(backbone, batch.images, attention=False))
        assert torch.equal(stored.labels, batch.labels)


def test_views_are_crops_of_training_and_each_use_draws_one(tmp_path):
    own = draw_images(tmp_path / "own")
    noise = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    Image.fromarray(noise).save(own / "train" / "green" / "1.png")  # image 7
    task = probe(own, tmp_path, cached(tmp_path, views=3, standardise=False, batch=1))
    found, config = computed(task), task.config
    backbone = task._load_backbone(ALONE.device)
    transform, expected = training_transform(config.data), []
    for view in range(3):
        torch.manual_seed(int(hash64(config.seed, view, 7)[0]))
        image = transform(task._train_features.images.read(7)[0].permute(2, 0, 1))
        expected.append(pool(backbone, image[None], attention=False)[0])
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        row = found.load(7).image
        seen.add(next(v for v, one in enumerate(expected) if torch.equal(row, one)))
    assert seen == {0, 1, 2}


def test_standardised_features_have_mean_zero_and_deviation_one(images, tmp_path):
    found = computed(probe(images, tmp_path, cached(tmp_path)))
    rows = torch.stack([found.load(row).image for row in range(len(found))])
    assert rows.mean(0).abs().max() < 1e-4
    live = rows.std(0, correction=0)
    assert live.max() < 1.0001
    assert live.median() > 0.9  # 1e-6 is added to variances, of which small ones feel it


def test_an_interrupted_cache_goes_on_and_a_damaged_file_is_made_again(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "ROWS", 5)
    whole = computed(probe(images, tmp_path / "whole", cached(tmp_path / "whole")))
    with pytest.raises(StoppedEarly, match="after 1 of 6 files"):
        computed(probe(images, tmp_path, cached(tmp_path)), lambda: True)
    first = files(tmp_path)
    assert len(first) == 1
    found = computed(probe(images, tmp_path, cached(tmp_path)))
    assert files(tmp_path).items() > first.items()
    victim = found.path(found.parts()[1])
    victim.write_bytes(victim.read_bytes()[:-100])
    before = files(tmp_path)
    again = computed(probe(images, tmp_path, cached(tmp_path)))
    assert [name for name, at in files(tmp_path).items() if before[name] != at] == [victim.name]
    for row in range(len(whole)):
        assert torch.equal(again.load(row).image, whole.load(row).image)


def test_other_weights_images_or_preparation_have_another_cache(images, tmp_path):
    def caches() -> set[str]:
        return {path.name for path in (tmp_path / "features").iterdir()}

    own = draw_images(tmp_path / "own")
    backbone = build_backbone(
        "vit", **small_classification(images, tmp_path).model.backbone.options
    )
    file = tmp_path / "weights.safetensors"
    save_file(backbone.state_dict(), file)
    base = cached(tmp_path) | {"model.init": str(file)}
    computed(probe(own, tmp_path, base))
    one = caches()
    computed(probe(own, tmp_path, base | {"optimizer.learning_rate": 1.0, "seed": 3}))
    assert caches() == one  # neither decides features
    image = own / "train" / "red" / "0.png"
    image.write_bytes((own / "train" / "blue" / "1.png").read_bytes())
    save_file({n: p + 1 for n, p in backbone.state_dict().items()}, file)
    for count, change in enumerate(({}, {"model.pooling": "attention"}, {"data.test_crop": 0.5})):
        computed(probe(own, tmp_path, base | change))
        assert len(caches()) == count + 2
    for folder in (tmp_path / "features").iterdir():
        assert json.loads((folder / "cache.json").read_text())["format"] == 1


def test_an_image_that_cannot_be_used_is_left_out_and_named(images, tmp_path):
    own = draw_images(tmp_path / "own")
    (own / "train" / "red" / "0.png").write_bytes(b"no image")
    found = computed(probe(own, tmp_path, cached(tmp_path)))
    with pytest.raises(BadSample, match=r"undecodable image: .*red/0.png"):
        found.load(12)
    (own / "test" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"test set cannot be used .*red/0.png"):
        computed(probe(own, tmp_path, cached(tmp_path)))
    strict = {"data.max_bad_rate": 0.0, "data.test_crop": 0.5}
    (own / "test" / "red" / "0.png").unlink()
    with pytest.raises(ConfigError, match="more than max_bad_rate"):
        computed(probe(own, tmp_path, cached(tmp_path) | strict))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (LARS, "set model.frozen: true"),
        ({"data.features": {"folder": "f"}}, "features are those of a frozen backbone"),
        (FROZEN | {"data.features": {"folder": "f"}, "data.augmentation": PLAIN | {"mixup": 0.8}},
         "mixup and cutmix mix images"),
        (FROZEN | LARS | {"engine.zero": {"stage": 3, "offload_optimizer": True}},
         "remove one of them"),
    ],
)  # fmt: skip
def test_what_a_probe_cannot_do_is_refused(images, tmp_path, overrides, sentence):
    with pytest.raises(ValidationError, match=sentence):
        small_classification(images, tmp_path, overrides)


# ------------------------------------------------------------------------------------------- LARS


def by_timm(task: ProbeTask) -> dict[str, torch.Tensor]:
    """The weights after the whole run, by timm's LARS on one process with MAE's groups."""
    config: Classification = task.config
    computed(task)
    stream = task.open_stream()
    with drawing(config.seed, ALONE.device):
        head = task.networks().head
    decay = config.optimizer.weight_decay
    optimizer = Lars(
        [{"params": [head.weight], "weight_decay": decay, "always_adapt": True},
         {"params": [head.bias], "weight_decay": 0.0, "always_adapt": False}],
        momentum=config.optimizer.betas[0],
    )  # fmt: skip
    schedule = make_schedule(config.optimizer, stream.samples)
    batches = iter(stream.loader(start=0, micro_batch=config.optimizer.global_batch_size))
    for step in range(schedule.total):
        inputs = task.prepare(next(batches), ALONE)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.zero_grad()
        F.cross_entropy(head(inputs.images), inputs.targets).backward()
        optimizer.step()
    return {f"head.{name}": value.detach() for name, value in head.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_lars_on_two_ranks_is_timms_on_one(images, tmp_path, stage):
    overrides = cached(tmp_path) | LARS | {"engine.zero": {"stage": stage}}
    expected = by_timm(probe(images, tmp_path, overrides))
    found = run_ranks(2, train_classifier, tmp_path, images=str(images), overrides=overrides)
    for result in found:
        assert result["finished"]
        for name, value in expected.items():
            assert torch.allclose(result["weights"][name], value, rtol=1e-4, atol=1e-6), name


def other_optimiser(
    world: World, folder: Path, images: str, overrides: dict[str, Any]
) -> list[str]:
    """What a resume by AdamW of a run of LARS says, without and with the change accepted."""
    train_classifier(world, folder, images, overrides | LARS)
    said = []
    for accept in ([], ["optimizer.kind"]):
        task = task_of(small_classification(Path(images), folder, overrides))
        stream = task.open_stream()
        try:
            session.open_run(
                task, world, stream, epoch_samples=stream.samples, resume="auto",
                sources=stream.identities(), accept=accept,
            )  # fmt: skip
        except (ConfigError, CheckpointError) as error:
            said.append(str(error))
    return said


@pytest.mark.distributed
def test_another_optimiser_does_not_go_on(images, tmp_path):
    overrides = cached(tmp_path) | {"engine.zero": {"stage": 1}}
    (said,) = run_ranks(1, other_optimiser, tmp_path, images=str(images), overrides=overrides)
    assert "optimizer.kind was 'lars' and is 'adamw'" in said[0]
    assert "holds momentum of another optimiser" in said[1]


@pytest.mark.distributed
def test_a_resumed_probe_is_bitwise_the_undisturbed_one(images, tmp_path):
    overrides = cached(tmp_path, views=2) | LARS | {"engine.zero": {"stage": 1}}
    found = run_ranks(
        2, train_and_resume_classifier, tmp_path, images=str(images), overrides=overrides
    )
    for result in found:
        assert result["whole"]["evaluation"] == result["resumed"]["evaluation"]
        for name, value in result["whole"]["weights"].items():
            assert torch.equal(value, result["resumed"]["weights"][name]), name
    stored = load_file(
        next((tmp_path / "small" / "checkpoints" / "step-00000002").glob("*.safetensors"))
    )
    kinds = {name.partition("/")[0] for name in stored}
    assert {"weight", "momentum"} <= kinds
    assert not any(kind.startswith("exp_avg") for kind in kinds)


def test_a_plan_counts_what_lars_keeps_and_a_backbone_outside_of_zero(images, tmp_path):
    def planned(overrides: dict[str, Any]) -> dict[str, float]:
        task = probe(images, tmp_path, overrides)
        plan = make_plan(task.config, task.trace(kernels=False), Cluster(gpu("h100"), 1, 2))
        return plan.state

    adam, lars = planned(FROZEN), planned(cached(tmp_path) | LARS)
    assert lars[MOMENTS] == adam[MOMENTS] / 2 > 0
    assert adam[FROZEN_NETWORKS] > 0
    assert lars[FROZEN_NETWORKS] == 0
