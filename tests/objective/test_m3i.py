"""The whole objective against an independent computation, sample by sample, in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.small import random_batch, small_config
from m3i_scale.config import Config
from m3i_scale.models.positions import relative_positions
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.m3i import M3I
from m3i_scale.objective.roles import patchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAMBDA = 0.37


def build(config: Config, size: int = 6) -> tuple[M3I, MixedBatch]:
    torch.manual_seed(0)
    model = M3I(config.model, config.objective, config.data.image_size)
    for parameter in model.parameters():  # the encoders must differ for the test to tell them apart
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    view = build_input(
        random_batch(size), config.objective.input, mean=MEAN, std=STD, dtype=torch.float32
    )
    return model, view


def independent_loss(model: M3I, size: int) -> tuple[Tensor, Tensor]:
    """L_SSP and L_SP (arXiv 2211.09807, Section 3) of the batch `random_batch(size)`, by loops."""
    batch = random_batch(size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    view_a, view_b = (
        (v.permute(0, 3, 1, 2).float() / 255 - mean) / std for v in (batch.view_a, batch.view_b)
    )
    backbone, teacher = model.student.backbone, model.teacher.backbone
    texts = F.normalize(model.text_tower(batch.tokens, batch.token_mask), dim=-1)
    text_rows = [n for n in range(size) if batch.has_text[n]]
    scale = model.temperatures["text"].log_scale.exp()
    ssp, sp = torch.zeros(()), torch.zeros(())
    for n in range(size):
        j = n + 1 if n % 2 == 0 else n - 1
        pixels = batch.mask[n].repeat_interleave(16, 0).repeat_interleave(16, 1)
        mix = torch.where(pixels, view_a[n], view_a[j])
        z = backbone.features(mix[None])[0]  # (N, D)
        grid = model.grid
        for image, seen in ((n, batch.mask[n].flatten()), (j, ~batch.mask[n].flatten())):
            box, flip = batch.box_a[image][None], batch.flip_a[image][None]
            own = relative_positions(box, flip, box, flip, grid)[0]
            if image == n:  # image i: same view, masked positions
                target = teacher.features(view_a[image][None])[0][~seen]
                wanted = own[~seen]
            else:  # image j: the other view, all positions
                target = teacher.features(view_b[image][None])[0]
                other = batch.box_b[image][None], batch.flip_b[image][None]
                wanted = relative_positions(box, flip, *other, grid)[0]
            own, wanted = own.clone(), wanted.clone()
            for places in (own, wanted):  # of 4 x 4 patches, counted in the decoder's grid
                places[:, :2] = (places[:, :2] + 0.5) * model.position_side / 4 - 0.5
            decoded = model.decoders["features"](z[seen][None], own[seen][None], wanted[None])[0]
            target = (target - target.mean(-1, keepdim=True)) / torch.sqrt(
                target.var(-1, unbiased=False, keepdim=True) + 1e-6
            )
            ssp = ssp + (target.detach() - decoded).square().mean() / size
            pooled = backbone.pool(z[None], seen[None])
            if batch.has_text[image]:
                predicted = F.normalize(model.text_projection(pooled), dim=-1)[0]
                scores = torch.stack([predicted @ texts[r] * scale[0] for r in text_rows])
                own_text = text_rows.index(image)
                sp = sp - scores.log_softmax(0)[own_text] / size
            if batch.category[image] >= 0:
                logs = (pooled @ model.category_head.classifier.weight.T)[0].log_softmax(0)
                sp = sp - (0.9 * logs[batch.category[image]] + 0.1 * logs.mean()) / size
    return ssp, sp


def test_text_and_category_of_an_image_share_its_pool(small: Config):
    model, view = build(small)
    calls: list[object] = []
    model.student.backbone.pooling.register_forward_hook(lambda *_: calls.append(None))
    model(view)
    assert len(calls) == 2  # image i and image j


@pytest.mark.parametrize("position_grid", [None, 3])
def test_loss_and_all_gradients_equal_the_independent_computation(
    position_grid: int | None, tmp_path: Path
):
    model, view = build(small_config(tmp_path, {"model.decoder.position_grid": position_grid}))
    assert model.position_side == (position_grid or 4)
    model.eval()
    found = model(view, LAMBDA)["loss"]
    found.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    squares = model.probe.squares(LAMBDA)
    model.zero_grad()
    ssp, sp = independent_loss(model, len(view.image))
    expected = ssp + LAMBDA * sp
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    # The bias of attention keys has no gradient but rounding: softmax ignores a common shift.
    noise = 1e-7 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale + noise, msg=name
        )
    assert (squares > 0).all()


def test_every_trained_parameter_gets_a_gradient_and_the_momentum_encoder_none(small: Config):
    model, view = build(small)
    model.train()
    model(view)["loss"].backward()
    for name, parameter in model.named_parameters():
        trained = not name.startswith("teacher.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name


def test_gradient_norms_at_the_features_are_those_of_the_two_losses(small: Config):
    model, view = build(small)
    model(view, LAMBDA)["loss"].backward()
    found = model.probe.squares(LAMBDA)
    for index, weight in enumerate((0.0, 1.0)):  # L_SSP alone, then L_SSP + L_SP minus it
        captured: list[Tensor] = []
        original = model.student.backbone.features

        def features(images: Tensor, keys: Tensor, *, original=original, captured=captured):
            captured.append(original(images, keys))
            return captured[-1]

        model.student.backbone.features = features
        ssp = model(view, 0.0)["loss"]
        (gradient,) = torch.autograd.grad(ssp, captured[0])
        if weight:
            captured.clear()
            both = model(view, 1.0)["loss"]
            (total,) = torch.autograd.grad(both, captured[0])
            gradient = total - gradient
        model.student.backbone.features = original
        torch.testing.assert_close(found[index], gradient.square().sum(), rtol=1e-3, atol=1e-12)


def test_samples_without_text_or_category_are_masked_out(small: Config):
    model, view = build(small)
    bare = view._replace(
        has_text=torch.zeros_like(view.has_text), category=torch.full_like(view.category, -1)
    )
    outputs = model(bare, 1.0)
    outputs["loss"].backward()
    assert outputs["loss/text_i"].tolist() == [0.0, 0.0]
    assert outputs["loss/category_j"].tolist() == [0.0, 0.0]
    for parameter in model.text_tower.parameters():
        assert parameter.grad is not None  # ran, with gradient zero
        assert (parameter.grad == 0).all()


def test_momentum_encoder_has_no_drop_path_in_training(small_tree: dict[str, Any]):
    small_tree["model"]["backbone"]["options"]["drop_path_rate"] = 0.5
    model, view = build(Config.model_validate(small_tree))
    model.train()
    first, second = (model.target_outputs(view).images["teacher", "a"] for _ in range(2))
    assert torch.equal(first.features, second.features)


@pytest.mark.parametrize("i", ["same", "other"])
@pytest.mark.parametrize("j", ["same", "other"])
def test_all_four_combinations_of_target_views(small_tree: dict[str, Any], i: str, j: str):
    for target, view in zip(small_tree["objective"]["targets"], (i, j), strict=False):
        target |= {"view": view, "positions": "all"}
    model, view = build(Config.model_validate(small_tree))
    outputs = model(view)
    assert torch.isfinite(outputs["loss"])
    wanted = {("teacher", "a") for v in (i, j) if v == "same"}
    wanted |= {("teacher", "b") for v in (i, j) if v == "other"}
    assert set(model.encodings) == wanted


def test_patchify_lists_the_pixels_of_each_patch():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[1, 4].view(3, 2, 2), image[1, :, 2:4, 2:4])


def test_a_patch_that_does_not_fit_the_stride_is_refused(small_tree: dict[str, Any]):
    small_tree["objective"]["input"] = {"patch": 8}
    config = Config.model_validate(small_tree)
    with pytest.raises(ValueError, match="patch 8 is not a multiple of the backbone's stride 16"):
        M3I(config.model, config.objective, 64)


def test_larger_patches_cover_several_tokens(small_tree: dict[str, Any]):
    small_tree["objective"]["input"] = {"patch": 32}
    config = Config.model_validate(small_tree)
    model = M3I(config.model, config.objective, 64)
    batch = random_batch(4, patch=32)
    view = build_input(batch, config.objective.input, mean=MEAN, std=STD, dtype=torch.float32)
    roles = model.roles(view)
    assert torch.equal(roles["i"].seen, ~roles["j"].seen)
    expected = batch.mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert torch.equal(roles["i"].seen, expected)
    assert torch.isfinite(model(view)["loss"])


def test_texts_tell_predictions_of_their_own_image_apart_in_a_mix(small_tree: dict[str, Any]):
    likelihood = {"form": "boltzmann", "temperature": 0.2, "symmetric": True}
    text = {"representation": "text", "regularisation": "negatives", "likelihood": likelihood}
    small_tree["objective"] |= {"targets": [text | {"name": "x", "image": "j"}], "balance": None}
    model, view = build(Config.model_validate(small_tree))
    found = model.eval()(view)["loss"]
    role = model.roles(view)["j"]
    texts = F.normalize(model.text_tower(view.tokens, view.token_mask), dim=-1)[role.sample]
    rows = view.has_text[role.sample].nonzero()[:, 0]
    backbone = model.student.backbone
    predicted = model.predict_text(backbone.pool(backbone.features(view.image), role.seen))
    scores = predicted[rows] @ texts[rows].T / 0.2
    own = torch.arange(len(rows))
    both = F.cross_entropy(scores, own, reduction="sum")
    both = both + F.cross_entropy(scores.T, own, reduction="sum")
    torch.testing.assert_close(found, both / 2 / len(view.image), rtol=1e-5, atol=1e-6)


def test_a_batch_of_smaller_views_is_that_of_networks_of_its_size(tmp_path: Path):
    config = small_config(tmp_path, {"data.image_size": 96})
    model, _ = build(config)
    smaller = {"data.image_size": 64, "model.decoder.position_grid": 6}
    other, view = build(small_config(tmp_path, smaller))
    other.load_state_dict(model.state_dict())
    (loss, figures), (expected, wanted) = ((m(view)["loss"], m(view)) for m in (model, other))
    assert torch.equal(loss, expected)
    assert figures.keys() == wanted.keys()
