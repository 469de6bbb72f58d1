"""Micro-batches whose samples are compared give loss and gradients of one large micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.small import SMALL, random_batch, small_tree
from helpers.teachers import linear_teacher
from m3i_scale.config import Config
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.step_loss import StepLoss

BATCH = 12
LAMBDA = 0.37
TEACHER = {"view": "other", "encoder": "teacher"}
STUDENT = {"view": "other", "encoder": "student"}
SOFTMAX = {"regularisation": "negatives", "normalise": "l2"}
DENSE = {"representation": "features", "regularisation": "stop_gradient"}
GAUSSIAN = {"likelihood": {"form": "gaussian"}}
FROZEN = {"view": "other", "encoder": "linear", "representation": "features"}
UNIGRAD = {"regularisation": "decorrelation", "decorrelation": "unigrad"}


def boltzmann(**keys: Any) -> dict[str, Any]:
    return {"likelihood": {"form": "boltzmann", "temperature": 0.2} | keys}


# Target groups by name; the rest of the small configuration stays, its mix of two images, too.
METHODS: dict[str, list[dict[str, Any]]] = {
    "M3I": yaml.safe_load(SMALL)["objective"]["targets"],
    "CLIP": [
        {"representation": "text", "regularisation": "negatives", "image": image}
        | boltzmann(symmetric=True, learnable=True, label_smoothing=0.1)
        for image in ("i", "j")
    ],
    "SigLIP": [
        {"representation": "text", "regularisation": "negatives", "image": image}
        | {"likelihood": {"form": "sigmoid", "bias": -4.0}}
        for image in ("i", "j")
    ],
    "sigmoids of patches": [
        STUDENT | SOFTMAX | {"representation": "features", "decoder": "linear"}
        | {"likelihood": {"form": "sigmoid"}}
    ],
    "SimCLR": [STUDENT | SOFTMAX | {"representation": "global"} | boltzmann(symmetric=True)],
    "MoCo": [TEACHER | SOFTMAX | {"representation": "global"} | boltzmann(queue=19)],
    "DenseCL": [
        TEACHER | SOFTMAX | {"representation": "features", "decoder": "projector"}
        | {"match": "similarity"} | boltzmann(candidates="own", queue=7)
    ],
    "dense pairs": [
        STUDENT | SOFTMAX | {"representation": "features", "decoder": "linear"} | boltzmann()
    ],
    "Barlow Twins": [
        STUDENT | GAUSSIAN | {"representation": "global", "regularisation": "decorrelation"}
    ],
    "centred": [DENSE | GAUSSIAN | {"normalise": "layer_norm", "centre": "batch"}],
    "running centre": [DENSE | GAUSSIAN | {"normalise": "layer_norm", "centre": "running"}],
    "UniGrad": [DENSE | GAUSSIAN | UNIGRAD | {"view": "other", "image": "j"}],
    "UniGrad, centred": [
        DENSE | GAUSSIAN | UNIGRAD | {"normalise": "layer_norm", "centre": "batch"}
    ],
    "frozen teacher, centred": [
        FROZEN | GAUSSIAN | {"normalise": "layer_norm", "centre": "running", "decoder": "linear"}
    ],
    "frozen teacher, softmax": [
        FROZEN | SOFTMAX | {"representation": "global"} | boltzmann(queue=19)
    ],
    "centred softmax": [
        STUDENT | {"representation": "global", "regularisation": "negatives"} | boltzmann()
        | {"normalise": "layer_norm", "centre": "batch"}
    ],
}  # fmt: skip


def configure(name: str, *, both_views: bool = False, checkpointed: bool = False) -> Config:
    tree = yaml.safe_load(SMALL)
    targets = [{"name": f"{name}{n}"} | target for n, target in enumerate(METHODS[name])]
    tree["objective"] |= {
        "targets": [t | {"name": t["name"].replace(" ", "").replace(",", "")} for t in targets]
    }
    if name != "M3I":
        tree["objective"]["balance"] = None
    tree["objective"]["input"] = {"both_views": both_views}
    tree["model"]["frozen_teachers"] = {"linear": {"source": "none"}}
    tree["model"]["global_head"] = {"hidden": 20, "width": 12}
    # Stochastic depth as well: what is dropped must be the same in both passes.
    drop = {"drop_path_rate": 0.3, "drop_path_type": "uniform"}
    tree["model"]["backbone"]["options"] |= drop | {"checkpoint_blocks": checkpointed}
    return Config.model_validate(tree)


def build(config: Config) -> M3I:
    torch.manual_seed(0)
    frozen = {"linear": linear_teacher(stride=8)} if config.objective.frozen_teachers else None
    model = M3I(config.model, config.objective, config.data.image_size, frozen)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def make(config: Config, size: int, start: int) -> MixedBatch:
    batch = random_batch(size, start=start)
    spec = config.objective.input
    return build_input(batch, spec, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.float32)


def whole_batch(model: M3I, config: Config, start: int) -> dict[str, Tensor]:
    """One optimiser step of one micro-batch: loss and figures; gradients add up in the model."""
    outputs = model(make(config, BATCH, start), LAMBDA)
    outputs["loss"].backward()
    return outputs | {"squares": model.probe.squares(LAMBDA)}


def in_parts(model: M3I, config: Config, start: int, parts: int) -> dict[str, Tensor]:
    """The same in micro-batches: mean loss, sums of figures, norms as the loop computes them."""
    size = BATCH // parts
    views = [make(config, size, start + n * size) for n in range(parts)]
    step = StepLoss(config.objective)
    with torch.no_grad():
        for view in views:
            assert model(view, step=step) == {}
    step.close(model.queues, model.running_centres)
    found: dict[str, Tensor] = {}
    for view in views:
        outputs = model(view, LAMBDA, step=step)
        (outputs["loss"] / parts).backward()
        outputs |= {
            "squares": model.probe.squares(LAMBDA) / parts,
            "loss": outputs["loss"].detach(),
        }
        found = {name: found.get(name, 0) + value for name, value in outputs.items()}
    return found | {"loss": found["loss"] / parts, "squares": found["squares"] / parts}


@pytest.mark.parametrize(
    ("name", "both_views"),
    [(name, False) for name in METHODS]
    + [(name, True) for name in ("M3I", "SimCLR", "MoCo", "running centre")],
)
def test_parts_give_what_the_whole_batch_gives(name: str, both_views: bool):
    config = configure(name, both_views=both_views, checkpointed=not both_views)
    one, other = build(config), build(config)
    for step in range(2):  # the first fills the queues
        one.zero_grad()
        other.zero_grad()
        whole = whole_batch(one, config, step * BATCH)
        parts = in_parts(other, config, step * BATCH, parts=3)
        torch.testing.assert_close(parts["loss"], whole["loss"].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(parts["squares"], whole["squares"], rtol=1e-4, atol=0)
        for figure in whole:
            if figure.startswith(("loss/", "accuracy/")):
                sums = [outputs[figure][0] / outputs[figure][1] for outputs in (parts, whole)]
                torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)
        scale = max(p.grad.abs().max().item() for p in one.parameters() if p.grad is not None)
        for (key, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), key
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)
        flat = [
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            for model in (one, other)
        ]
        assert (flat[0] - flat[1]).norm() <= 2e-6 * flat[0].norm()
        for (key, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=key)


def test_candidates_of_one_rank_are_refused_with_negatives_of_the_batch():
    tree = yaml.safe_load(SMALL)
    tree["objective"]["targets"][2]["likelihood"]["candidates"] = "local"
    Config.model_validate(tree)
    tree["objective"]["negatives"] = "batch"
    with pytest.raises(ValueError, match=r"'text_i' has likelihood.candidates: local.*micro_step"):
        Config.model_validate(tree)


def test_a_second_pass_is_made_only_where_it_changes_something():
    tree = small_tree(overrides={"model.frozen_teachers": {"linear": {"source": "none"}}})
    for targets in METHODS.values():
        named = [target | {"name": f"x{n}"} for n, target in enumerate(targets)]
        own = {"targets": named, "negatives": "batch", "balance": None}
        objective = Config.model_validate(tree | {"objective": own}).objective
        assert objective.runs_twice(2)
        assert not objective.runs_twice(1)
    plain = {"name": "x"} | DENSE | GAUSSIAN
    classes = {"name": "y", "representation": "category", "regularisation": "negatives"}
    own = {"targets": [plain, classes | boltzmann()], "negatives": "batch"}
    assert not Config.model_validate(tree | {"objective": own}).objective.runs_twice(2)
