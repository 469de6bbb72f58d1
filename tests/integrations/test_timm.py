"""InternImage in timm, by the assertions of timm's own tests, on small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import create_feature_extractor, get_pretrained_cfg
from timm.optim import param_groups_layer_decay

import m3i_scale.integrations.timm_models  # noqa: F401  (registers)
from helpers.published import (
    CLASSES,
    IMAGES,
    STYLES,
    random_model,
    write_published,
    write_timm_config,
)
from m3i_scale.models.intern_image import INTERN_IMAGE_VARIANTS, InternImage

LEVELS = [16, 32, 64, 128]


def create(style: str, **arguments: Any) -> Any:
    return timm.create_model("intern_image", **STYLES[style], **arguments)


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_published_sizes_are_registered():
    names = [f"intern_image_{size}" for size in INTERN_IMAGE_VARIANTS]
    assert set(timm.list_models("intern_image*")) == {"intern_image", *names}
    for size, name in zip(INTERN_IMAGE_VARIANTS, names, strict=True):
        with torch.device("meta"):
            model = timm.create_model(name)
            expected = InternImage(**INTERN_IMAGE_VARIANTS[size]).state_dict()
        state = model.state_dict()
        assert {n: p.shape for n, p in state.items()} == {n: p.shape for n, p in expected.items()}
        config = get_pretrained_cfg(name)
        assert config.hf_hub_id.startswith(f"OpenGVLab/internimage_{size}_")
        assert f"{config.classifier}.weight" in state
        assert f"{config.first_conv}.weight" in state
        stride = 16 if model.use_clip_projector else 32
        assert config.pool_size[0] * stride == config.input_size[1]
        model.set_grad_checkpointing()
        assert all(level.checkpoint_blocks for level in model.levels)


def test_features_head_and_classifier(style: str):
    model = create(style, num_classes=CLASSES).eval()
    side = 4 if style == "h" else 2
    with torch.no_grad():
        features = model.forward_features(IMAGES)
        assert features.shape == (2, model.num_features, side, side)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), model(IMAGES))
        model.reset_classifier(3)
        assert model(IMAGES).shape == (2, 3)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(IMAGES), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(IMAGES), features)
        other = create(style, num_classes=0, global_pool="").eval()
        assert other(IMAGES).shape == features.shape
    for arguments in ({"num_classes": 3}, {"num_classes": 0, "global_pool": "avg"},
                      {"num_classes": 0, "global_pool": "max"}):  # fmt: skip
        with pytest.raises(ValueError, match="pool"):
            model.reset_classifier(**arguments)


@pytest.mark.parametrize("arguments", [{}, {"pre_classifier": False, "drop_path_rate": 0.3}])
def test_every_parameter_has_a_gradient(style: str, arguments: dict[str, Any]):
    model = create(style, num_classes=42, drop_rate=0.1, **arguments).train()
    model.set_grad_checkpointing()
    outputs = model(IMAGES)
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(outputs).all()


def test_other_channels_and_sizes(style: str):
    model = create(style, in_chans=5, num_classes=3).eval()
    assert model(torch.randn(1, 5, 96, 64)).shape == (1, 3)
    if style == "h":
        with pytest.raises(ValueError, match="multiples of 32"):
            model(torch.randn(1, 5, 80, 64))
    else:
        assert model(torch.randn(1, 5, 70, 90)).shape == (1, 3)


def test_feature_pyramids(style: str):
    model = create(style, features_only=True)
    assert model.feature_info.channels() == LEVELS
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(IMAGES)
    assert [x.shape[1] for x in maps] == LEVELS
    assert [64 // x.shape[2] for x in maps] == model.feature_info.reduction()
    sum(x.sum() for x in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    chosen = create(style, features_only=True, out_indices=(1, -2))
    assert [x.shape[1] for x in chosen(IMAGES)] == [32, 64]
    assert not any("levels.3" in name for name in chosen.state_dict())


def test_intermediates(style: str):
    model = create(style).eval()
    with torch.no_grad():
        features, maps = model.forward_intermediates(IMAGES)
        assert torch.equal(features, model.forward_features(IMAGES))
        own = model.forward_stages(IMAGES)
        assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, own, strict=True))
        (early,) = model.forward_intermediates(
            IMAGES, indices=[1], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        assert torch.equal(early, own[1])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(IMAGES, output_fmt="NLC")


def test_traced_by_fx(style: str):
    model = create(style, num_classes=3).eval()
    traced = create_feature_extractor(model, return_nodes={"head": "logits"})
    with torch.no_grad():
        assert torch.equal(traced(IMAGES)["logits"], model(IMAGES))


def test_scripting_says_what_to_use_instead(style: str):
    with pytest.raises(RuntimeError, match=r"use torch\.compile"):
        torch.jit.script(create(style))
    traced = create_feature_extractor(create(style), return_nodes={"head": "logits"})
    with pytest.raises(RuntimeError, match=r"use torch\.compile"):  # operators are its leaves
        torch.jit.script(traced)


def test_layer_decay_has_a_layer_for_each_block(style: str):
    model = create(style, num_classes=3)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scale = {name: rates[id(p)] for name, p in model.named_parameters()}
    blocks = ["0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0"]
    found = [scale[f"levels.{block}.dcn.offset.weight"] for block in blocks]
    assert found == [2.0**-n for n in (5, 4, 3, 2, 1)]
    assert scale["patch_embed.conv1.weight"] == 2.0**-6
    assert scale["levels.0.downsample.conv.weight"] == scale["levels.0.blocks.0.mlp.fc1.weight"]
    assert scale["head.weight"] == 1
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all((p.ndim > 1) == (id(p) in decayed) for p in model.parameters())
    assert len(model.group_matcher(coarse=True)) == 2


def test_published_weights_from_files(style: str, tmp_path: Path):
    model = write_published(tmp_path, style)
    file = {"file": str(tmp_path / "model.safetensors")}
    overlay = file | {"num_classes": CLASSES}
    with torch.no_grad():
        logits = model(IMAGES)
        loaded = create(style, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(loaded(IMAGES), logits)
        # What the classifier sees; a pyramid; another number of classes; grey images.
        pooled = create(style, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
        assert torch.equal(model.head(pooled.eval()(IMAGES)), logits)
        pyramid = create(style, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
        maps = [x.permute(0, 2, 3, 1) for x in pyramid.eval()(IMAGES)]
        assert all(
            torch.equal(a, b) for a, b in zip(maps, model.forward_stages(IMAGES), strict=True)
        )
        grey = create(style, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
        weight = model.patch_embed.conv1.weight.sum(1, keepdim=True)
        assert torch.allclose(grey.patch_embed.conv1.weight, weight)
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    overlay["file"] = str(tmp_path / "published.pth")
    other = create(style, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9)
    assert torch.equal(other.patch_embed.conv1.weight, model.patch_embed.conv1.weight)
    assert other.head.weight.shape[0] == 9


def test_a_folder_of_a_pretrained_backbone(tmp_path: Path):
    model = random_model("h", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_timm_config(tmp_path, STYLES["h"], 0)
    folder = f"local-dir:{tmp_path}"
    loaded = timm.create_model(folder, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model.forward_embedding(IMAGES))
        tokens = loaded.forward_features(IMAGES).flatten(2).transpose(1, 2)
        assert torch.equal(tokens, model.features(IMAGES))
    data = timm.data.resolve_data_config({}, model=loaded)
    assert list(data["mean"]) == [0.1, 0.2, 0.3]
    assert list(data["std"]) == [0.4, 0.5, 0.6]
    assert list(data["input_size"]) == [3, 64, 64]
    tuned = timm.create_model(folder, pretrained=True, num_classes=7, pre_classifier=True)
    assert tuned(IMAGES).shape == (2, 7)
    assert torch.equal(
        tuned.clip_projector.cross_dcn.q.weight, model.clip_projector.cross_dcn.q.weight
    )
