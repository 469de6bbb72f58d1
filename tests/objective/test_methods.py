"""Every file of configs/methods: laid over a run it loads, and one step trains all it should."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml

from helpers.small import SMALL, random_batch
from helpers.teachers import linear_teacher
from m3i_scale.config import (
    Balance,
    Boltzmann,
    Config,
    FrozenTeacher,
    Gaussian,
    GlobalHead,
    Input,
    Objective,
    Sigmoid,
    Target,
    load_config,
)
from m3i_scale.objective.inputs import build_input
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.masks import PatchMask

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
BACKBONES = {
    "intern_image": yaml.safe_load(SMALL)["model"]["backbone"]["options"],
    "vit": {"width": 24, "depth": 1, "heads": 2, "pool_heads": 3, "embed_dim": 18},
}
ROWS = {
    "image_classification", "language_image_contrastive", "auto_encoder", "dense_distillation",
    "global_distillation", "mim_pixel", "mim_feature", "mim_global", "novel_view_synthesis",
    "dense_instance_discrimination", "instance_discrimination_negatives",
    "instance_discrimination_predictor", "instance_discrimination_decorrelation",
    "masked_instance_discrimination", "siamim_pixel", "siamim_feature", "siamim_global",
    "m3i_without_mixing", "m3i",
}  # fmt: skip


def laid_over(run: Path, method: Path, folder: Path) -> Config:
    """The method over the run, as a user writes it."""
    path = folder / f"over-{method.stem}.yaml"
    path.write_text(yaml.safe_dump({"base": [str(run), str(method)], "run": method.stem}))
    return load_config(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tree = yaml.safe_load(SMALL)
    tree["model"]["global_head"] = {"hidden": 20, "width": 12}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_row_of_table_1_is_there():
    assert {path.stem for path in METHODS} >= ROWS


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_replaces_the_objective_of_the_run_below_it(method: Path, tmp_path: Path):
    alone = load_config(method, _networks_and_data())
    for run in (CONFIGS / "demo.yaml", CONFIGS / "pretrain_internimage_h.yaml"):
        # What belongs to the run stays the run's: over which samples its step compares.
        own = {"negatives": load_config(run, []).objective.negatives}
        expected = alone.objective.model_copy(update=own)
        assert laid_over(run, method, tmp_path).objective == expected


def _networks_and_data() -> list[str]:
    tree = yaml.safe_load(SMALL)
    tree["model"].pop("global_head", None)
    keys = {f"model.{key}": value for key, value in tree["model"].items()}
    keys |= {key: tree[key] for key in ("run", "data", "optimizer")}
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in keys.items()
    ]


def documented() -> list[str]:
    """The methods written out in the documentation."""
    page = (CONFIGS.parent / "docs" / "methods.md").read_text()
    return re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("number", range(len(documented())))
def test_methods_of_the_documentation_train(number: int, run: Path, tmp_path: Path):
    method = tmp_path / "written.yaml"
    method.write_text(documented()[number])
    test_one_step_gives_a_gradient_to_all_that_is_trained(method, "vit", run, tmp_path)


def test_the_documentation_names_every_key_and_value():
    page = (CONFIGS.parent / "docs" / "methods.md").read_text()
    written = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    for node in (Input, Target, Gaussian, Boltzmann, Sigmoid, GlobalHead, FrozenTeacher, Balance):
        for name, field in node.model_fields.items():
            missing = ({name} | set(choices(field.annotation))) - written
            assert not missing - {"form"}, (node.__name__, missing)


def choices(kind: Any) -> Iterator[str]:
    """The values of a Literal, in unions too."""
    if typing.get_origin(kind) is Literal:
        yield from typing.get_args(kind)
    else:
        for part in typing.get_args(kind):
            yield from choices(part)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [("vit", path) for path in METHODS]
    + [("intern_image", path) for path in METHODS if path.stem in ("mim_pixel", "m3i")],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_one_step_gives_a_gradient_to_all_that_is_trained(
    method: Path, backbone: str, run: Path, tmp_path: Path
):
    config = laid_over(run, method, tmp_path)
    part = {"name": backbone, "options": BACKBONES[backbone]}
    tree = config.model_dump() | {"model": config.model.model_dump() | {"backbone": part}}
    config = Config.model_validate(tree)
    teachers = {name: linear_teacher() for name in config.objective.frozen_teachers}
    torch.manual_seed(0)
    model = M3I(config.model, config.objective, config.data.image_size, teachers).train()
    outputs = model(one_batch(config, 4))
    outputs["loss"].backward()
    assert torch.isfinite(outputs["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    pooled = config.objective.representations & {"global", "text", "category"}
    assert any(".attention_pool." in n or ".clip_projector." in n for n in trained) == bool(pooled)
    assert all(torch.isfinite(pair).all() for pair in outputs.values())


def one_batch(config: Config, size: int):
    """A batch as the stream would give it."""
    spec = config.objective.input
    batch = random_batch(size, image_size=config.data.image_size, patch=spec.patch)
    side = config.data.image_size // spec.patch
    mask = PatchMask(side, side, spec.ratio, spec.mask)
    drawn = [torch.as_tensor(mask(np.random.default_rng(n))) for n in range(size)]
    batch.mask = torch.stack(drawn)
    return build_input(batch, spec, mean=config.data.mean, std=config.data.std, dtype=torch.float32)


FEATURES = {
    "name": "x",
    "representation": "features",
    "regularisation": "stop_gradient",
    "likelihood": {"form": "gaussian"},
}
SOFTMAX = {"regularisation": "negatives", "likelihood": {"form": "boltzmann"}}
TEXT = SOFTMAX | {"representation": "text"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"regularisation": "none"}, "without regularisation collapses"),
        ({"regularisation": "negatives"}, "negatives enter through a softmax"),
        ({"representation": "pixels"}, "pixels cannot collapse"),
        ({"representation": "text"}, "told from the other text targets"),
        (SOFTMAX | {"regularisation": "decorrelation"}, "a regularisation of the Gaussian form"),
        ({"regularisation": "decorrelation"}, "decorrelation: unigrad"),
        (TEXT | {"view": "other"}, "has no view"),
        (TEXT | {"normalise": "layer_norm"}, "no other normalisation"),
        (TEXT | {"decoder": "linear"}, "no positions that a decoder could predict"),
        ({"view": "other", "positions": "masked"}, "have masked positions"),
        ({"normalise": "norm_pix"}, "standardises the pixels of a patch"),
        ({"normalise": "instance_norm", "representation": "global"}, "a global target has none"),
        ({"normalise_prediction": "instance_norm"}, "and predictions are of some"),
        (
            {"decoder": "projector", "representation": "pixels", "regularisation": "none"},
            "pixels are no",
        ),
        ({"match": "similarity"}, "pairs tokens of two views"),
        (
            {"match": "similarity", "representation": "pixels", "regularisation": "none",
             "view": "other", "decoder": "linear"},
            "similarity is that of features",
        ),
        (SOFTMAX | {"likelihood": {"form": "boltzmann", "candidates": "own"}}, "only candidate"),
        (
            SOFTMAX | {"likelihood": {"form": "boltzmann", "queue": 8}, "encoder": "student"},
            "targets that change slowly",
        ),
        (TEXT | {"likelihood": {"form": "boltzmann", "queue": 8}}, "targets that change slowly"),
        (
            SOFTMAX | {"likelihood": {"form": "boltzmann", "queue": 8, "symmetric": True}},
            "no predictions",
        ),
        ({"centre": "batch"}, "centre takes the mean out of standardised targets"),
        ({"centre": "running", "normalise": "l2"}, "set normalise: layer_norm"),
        (
            SOFTMAX | {"normalise": "layer_norm", "centre": "batch",
                       "likelihood": {"form": "boltzmann", "queue": 8}},
            "with other centres",
        ),
        (
            SOFTMAX | {"likelihood": {"form": "boltzmann", "learnable": True,
                                      "temperature": 0.005}},
            "cannot start at 0.005",
        ),
        ({"name": "a.b"}, "should match pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Target.model_validate(FEATURES | changes)


def test_automatic_positions_are_masked_where_something_is():
    def masked(corruption: str, view: str) -> bool:
        target = Target.model_validate(FEATURES | {"view": view})
        spec = Input(corruption=corruption)  # type: ignore[arg-type]
        return Objective(input=spec, targets=[target], balance=None).masked_positions(target)

    found = {(c, v): masked(c, v) for c in ("none", "mask", "mix") for v in ("same", "other")}
    assert [key for key, value in found.items() if value] == [("mask", "same"), ("mix", "same")]


@pytest.mark.parametrize(
    ("changes", "weight"),
    [({}, 0.005), ({"decorrelation": "unigrad"}, 0.02), ({"decorrelation_weight": 0.3}, 0.3)],
)
def test_each_decorrelation_has_its_published_weight(changes: dict[str, Any], weight: float):
    target = {"regularisation": "decorrelation", "representation": "global"}
    assert Target.model_validate(FEATURES | target | changes).redundancy_weight == weight


@pytest.mark.parametrize("decoder", ["transformer", "linear"])
@pytest.mark.parametrize("head", ["zero", "xavier"])
def test_the_head_of_dense_decoders_starts_as_the_setting_says(
    small_tree: dict[str, Any], head: str, decoder: str
):
    small_tree["model"]["decoder"]["head"] = head
    small_tree["objective"]["targets"][0]["decoder"] = decoder
    config = Config.model_validate(small_tree)
    model = M3I(config.model, config.objective, config.data.image_size)
    used = model.decoders["features"].head if decoder == "transformer" else None
    weight = (used or model.linear_decoders["features"]).weight
    assert (weight == 0).all() == (head == "zero")
    outputs = model(one_batch(config, 4))
    assert (outputs["spread_prediction/image_i"][0] == 0) == (head == "zero")
