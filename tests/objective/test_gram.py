"""Gram targets: similarities of tokens, against an independent computation in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from helpers.small import random_batch, small_tree
from helpers.teachers import linear_teacher
from m3i_scale.config import Config
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.likelihoods import gaussian, gram
from m3i_scale.objective.m3i import M3I

GRAM = {
    "name": "gram",
    "representation": "gram",
    "encoder": "early",
    "regularisation": "none",
    "likelihood": {"form": "gaussian"},
}


def configure(*targets: dict[str, Any], corruption: str = "none") -> Config:
    objective = {"input": {"corruption": corruption}, "targets": list(targets), "balance": None}
    teachers = {"early": {"source": "none"}}
    overrides = {"objective": objective, "model.frozen_teachers": teachers}
    return Config.model_validate(small_tree(overrides=overrides))


def build(config: Config) -> tuple[M3I, MixedBatch]:
    teacher = linear_teacher(10, stride=8)
    teacher.pooled_width = None  # nobody needs it
    torch.manual_seed(0)
    model = M3I(config.model, config.objective, 64, {"early": teacher})
    for parameter in model.student.parameters():  # a moving average that differs
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    normal: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "dtype": torch.float32}
    return model, build_input(random_batch(6), config.objective.input, **normal)


def test_loss_and_gradient_by_loops_over_pairs():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 3, dtype=torch.float64)
    found = gaussian(gram(x), gram(y), sigma=0.5**0.5, over_dimensions="mean").mean()
    found.backward()
    gradient, x.grad = x.grad, None
    total = torch.zeros((), dtype=torch.float64)
    for image in range(2):
        for a in range(5):
            for b in range(5):
                own, other = x[image, a], x[image, b]
                student = own @ other / (own.norm() * other.norm())
                own, other = y[image, a], y[image, b]
                total = total + (student - own @ other / (own.norm() * other.norm())) ** 2 / 50
    total.backward()
    torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("encoder", ["early", "teacher"])
@pytest.mark.parametrize(("corruption", "image"), [("none", "i"), ("mask", "i"), ("mix", "j")])
def test_tokens_that_show_the_image_are_compared(encoder: str, corruption: str, image: str):
    target = GRAM | {"encoder": encoder, "image": image, "regularisation": "stop_gradient"}
    model, batch = build(configure(target, corruption=corruption))
    assert hasattr(model, "teacher") == (encoder == "teacher")
    model.train()
    outputs = model(batch)
    features = model.student.backbone.features(batch.image)
    if encoder == "early":
        targets = model.frozen["early"](batch.clean_a, model.grid)[0]
    else:
        targets = model.teacher.backbone.features(batch.clean_a)
    losses = []
    for row in range(6):
        sample, seen = row, batch.seen[row].flatten()
        if image == "j":
            sample, seen = int(batch.partner[row]), ~seen
        a, b = (
            torch.nn.functional.normalize(v[seen], dim=1) for v in (features[row], targets[sample])
        )
        losses.append((a @ a.T - b @ b.T).square().mean())
    torch.testing.assert_close(outputs["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-7)
    assert outputs["loss"] > 1e-4
    outputs["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not list(model.frozen_heads)


def test_equal_networks_have_no_loss():
    model, batch = build(
        configure(GRAM | {"encoder": "teacher", "regularisation": "stop_gradient"})
    )
    model.teacher.backbone = copy.deepcopy(model.student.backbone)
    assert model.eval()(batch)["loss"] < 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": "other"}, "leave view and normalise out"),
        ({"normalise": "l2"}, "leave view and normalise out"),
        ({"encoder": "student", "regularisation": "stop_gradient"}, "encoder: teacher or a frozen"),
        ({"regularisation": "negatives", "likelihood": {"form": "boltzmann"}}, "not told apart"),
        ({"regularisation": "decorrelation", "decorrelation": "unigrad"}, "not told apart"),
        ({"encoder": "teacher"}, "without regularisation collapses"),
        ({"decoder": "linear"}, "leave decoder out"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configure(GRAM | changes)
