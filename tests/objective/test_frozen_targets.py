"""Targets of frozen teachers in the objective: the loss, who learns from it, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.small import random_batch, small_tree
from helpers.teachers import linear_teacher
from m3i_scale.config import Config
from m3i_scale.models.frozen import FrozenEncoder, on_grid
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.m3i import M3I

DENSE = {
    "name": "patches",
    "representation": "features",
    "encoder": "one",
    "regularisation": "none",
    "likelihood": {"form": "gaussian"},
}
WHOLE = {
    "name": "whole",
    "representation": "global",
    "view": "other",
    "encoder": "two",
    "regularisation": "none",
    "normalise": "l2",
    "likelihood": {"form": "gaussian", "over_dimensions": "sum"},
}


def configure(*targets: dict[str, Any], corruption: str = "none") -> Config:
    teachers = {"one": {"source": "none"}, "two": {"source": "none"}, "unused": {"source": "none"}}
    objective = {"input": {"corruption": corruption}, "targets": list(targets), "balance": None}
    return Config.model_validate(
        small_tree(
            overrides={
                "objective": objective,
                "model.frozen_teachers": teachers,
                "model.global_head": {"hidden": 20, "width": 12},
                "model.decoder.head": "xavier",
            }
        )
    )


def build(config: Config) -> tuple[M3I, MixedBatch, dict[str, FrozenEncoder]]:
    teachers = {"one": linear_teacher(10, stride=8), "two": linear_teacher(6, stride=32)}
    torch.manual_seed(0)
    model = M3I(config.model, config.objective, 64, teachers)
    normal: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "dtype": torch.float32}
    return model, build_input(random_batch(6), config.objective.input, **normal), teachers


def test_the_losses_of_two_teachers_of_other_widths_and_strides():
    linear = DENSE | {"decoder": "linear", "normalise": "layer_norm"}
    model, batch, teachers = build(configure(linear, WHOLE))
    outputs = model(batch)
    z_x = model.student.backbone.features(batch.image)
    patches = on_grid(teachers["one"].network(batch.clean_a).map, (4, 4)).flatten(2).mT
    patches = F.layer_norm(patches, (10,), eps=1e-6)
    dense = (patches - model.linear_decoders["one"](z_x)).square().mean()
    pooled = F.normalize(teachers["two"].network(batch.clean_b).pooled, dim=1)
    predicted = model.frozen_heads["two_global"](model.student.backbone.pool(z_x))
    whole = (pooled - F.normalize(predicted, dim=1)).square().sum(1).mean()
    torch.testing.assert_close(outputs["loss"], dense + whole, rtol=1e-5, atol=1e-6)
    assert not hasattr(model, "teacher")  # nobody asks for the moving average


@pytest.mark.parametrize("decoder", ["transformer", "linear", "projector"])
def test_all_that_is_trained_gets_a_gradient_and_no_teacher_is_a_part(decoder: str):
    of_j = DENSE | {"name": "j", "image": "j", "view": "other", "positions": "all"}
    targets = [one | {"decoder": decoder} for one in (DENSE, of_j)]
    model, batch, teachers = build(configure(*targets, WHOLE, corruption="mix"))
    model.train()(batch)["loss"].backward()
    assert not teachers["one"].training
    assert model.frozen == teachers
    inside = {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    for teacher in teachers.values():
        assert all(id(p) not in inside and p.grad is None for p in teacher.parameters())
    assert not any("unused" in name for name, _ in model.named_modules())


def test_heads_of_frozen_teachers_change_no_other_weight_that_is_drawn():
    text = small_tree()["objective"]["targets"][2]
    plain = build(configure(text))[0].state_dict()
    both = build(configure(text, DENSE))[0].state_dict()
    assert plain.keys() < both.keys()
    assert all(torch.equal(both[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "three"}, "encoder 'three', and there is none; take one of teacher, student,"),
        ({"representation": "pixels"}, "a pixels target has no image encoder"),
        (
            {"match": "similarity", "view": "other", "decoder": "linear"},
            "a frozen teacher has others; set match: position",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configure(DENSE | changes)


def test_names_that_mean_something_else_are_refused():
    overrides = {"model.frozen_teachers": {"student": {"source": "none"}}}
    with pytest.raises(ValueError, match="'student' means something else; rename it"):
        Config.model_validate(small_tree(overrides=overrides))


def test_a_global_target_needs_a_pooling():
    config = configure(WHOLE)
    teacher = linear_teacher(6)
    teacher.pooled_width = None
    with pytest.raises(ValueError, match="'whole' is global, and the frozen teacher two has no"):
        M3I(config.model, config.objective, 64, {"two": teacher})
