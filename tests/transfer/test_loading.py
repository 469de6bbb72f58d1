import pytest
import torch
from safetensors.torch import load_file

from helpers.run_folder import networks, write_run
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.transfer.export import export, load_backbone
from m3i_scale.transfer.loading import build_trained, build_untrained


@pytest.fixture(scope="module")
def reader(finished):
    return finished.reader(7)


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return [name for name in first if torch.equal(first[name], second[name])] == list(second)


def test_student_is_put_together_from_its_slices(config, made, reader):
    loaded = build_trained(config, reader)
    assert same(loaded.student, made.student)
    assert same(loaded.text_tower, made.text_tower)
    assert torch.equal(loaded.temperatures["text"].log_scale, made.temperatures["text"].log_scale)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_momentum_averages_replace_the_encoder_only(config, made, reader):
    loaded = build_trained(config, reader, "teacher")
    assert not same(made.student, made.teacher)
    assert same(loaded.student, made.teacher)
    assert same(loaded.text_tower, made.text_tower)


def test_a_checkpoint_holds_every_tensor_of_the_networks(config):
    """Nothing that counts is a buffer, which a checkpoint would not have."""
    built = build_untrained(config)
    assert set(built.state_dict()) == set(dict(built.named_parameters()))


def test_untrained_is_a_function_of_the_seed_alone(config):
    torch.manual_seed(1)
    first = build_untrained(config)
    before = torch.get_rng_state()
    second = build_untrained(config)
    assert same(first, second)
    assert torch.equal(before, torch.get_rng_state())
    other = build_untrained(config.model_copy(update={"seed": 1}))
    assert not same(first, other)


def test_checkpoint_of_other_networks_is_refused(config, reader):
    model = config.model.model_copy(update={"categories": 9})
    with pytest.raises(
        ValueError, match=r"1 parameters differ.*category_head.*\[5, 24\].*\[9, 24\]"
    ):
        build_trained(config.model_copy(update={"model": model}), reader)


def test_averages_of_a_run_without_a_momentum_encoder(tmp_path, config):
    supervised = [t for t in config.objective.targets if t.supervised]
    objective = config.objective.model_copy(update={"targets": supervised, "balance": None})
    plain = config.model_copy(update={"objective": objective, "folder": str(tmp_path)})
    folder = write_run(plain, networks(plain, seed=0))
    reader = CheckpointReader(folder / "checkpoints" / "step-00000007")
    assert build_trained(plain, reader)
    with pytest.raises(ValueError, match="no teacher"):
        build_trained(plain, reader, "teacher")


def test_a_pooling_that_no_target_trains_is_as_the_seed_made_it(tmp_path, config):
    dense = [t for t in config.objective.targets if t.dense]
    objective = config.objective.model_copy(update={"targets": dense, "balance": None})
    plain = config.model_copy(update={"objective": objective, "folder": str(tmp_path)})
    made = networks(plain, seed=3)
    reader = CheckpointReader(write_run(plain, made) / "checkpoints" / "step-00000007")
    backbones = [
        build_trained(plain, reader).student.backbone,
        build_trained(plain, reader, "teacher").student.backbone,
    ]
    untrained = build_untrained(plain).student.backbone
    for backbone, source in zip(backbones, (made.student, made.teacher), strict=True):
        assert same(backbone.pooling, untrained.pooling)
        assert same(backbone.levels, source.backbone.levels)
    for which, backbone in zip(("student", "teacher"), backbones, strict=True):
        path = tmp_path / f"{which}.safetensors"
        export(reader, plain, path, which=which)
        assert same(load_backbone(path).levels, backbone.levels)
        assert not any(name.startswith("clip_projector") for name in load_file(path))
