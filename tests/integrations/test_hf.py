"""InternImage in transformers: published folders, the Auto classes, detectors and segmenters."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from helpers.published import CLASSES, IMAGES, STYLES, random_model, write_published
from m3i_scale.integrations import hf
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.weights import hub_name

LEVELS = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(params=STYLES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, InternImage]:
    return tmp_path, write_published(tmp_path, request.param)


def test_a_published_folder_classifies_and_is_saved_under_its_names(
    published: tuple[Path, InternImage], tmp_path: Path
):
    folder, model = published
    loaded, report = AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(loaded) is hf.InternImageForImageClassification
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.num_labels == CLASSES
    with torch.no_grad():
        outputs = loaded(IMAGES, labels=torch.tensor([1, 2]), output_hidden_states=True)
        logits = model(IMAGES)
    assert torch.equal(outputs.logits, logits)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]))
    assert torch.allclose(outputs.loss, loss)
    assert [x.shape[-1] for x in outputs.hidden_states] == [16, 16, 8, 4, 2]
    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    first, second = (load_file(f / "model.safetensors") for f in (folder, saved))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = AutoModelForImageClassification.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(again(IMAGES).logits, logits)


def test_the_encoder_of_a_published_folder(published: tuple[Path, InternImage]):
    folder, model = published
    encoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(encoder) is hf.InternImageModel
    assert not report["missing_keys"]
    with torch.no_grad():
        outputs = encoder(pixel_values=IMAGES, return_dict=False)
        if model.use_clip_projector:
            features = model.features(IMAGES)
            assert torch.equal(outputs[0].flatten(2).transpose(1, 2), features)
            assert torch.equal(outputs[1], model.pool(features))
        else:
            last = model.forward_stages(IMAGES)[3]
            assert torch.equal(outputs[0], last.permute(0, 3, 1, 2))
            assert torch.allclose(outputs[1], last.mean((1, 2)))
    assert len(outputs) == 2


def test_backbone_of_a_published_folder(published: tuple[Path, InternImage]):
    folder, model = published
    backbone, report = hf.InternImageBackbone.from_pretrained(
        folder, out_features=["stem", "stage2", "stage4"], output_loading_info=True
    )
    assert not report["missing_keys"]
    assert backbone.channels == [16, 32, 128]
    maps = backbone(IMAGES).feature_maps
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 16, 16), (32, 8, 8), (128, 2, 2)]
    with torch.no_grad():
        own = model.forward_stages(IMAGES)
        assert torch.equal(maps[2], own[3].permute(0, 3, 1, 2))
    odd = backbone(torch.randn(1, 3, 70, 90)).feature_maps
    assert [tuple(x.shape[-2:]) for x in odd] == [(18, 23), (9, 12), (3, 3)]
    maps[2].sum().backward()
    # The stages that are asked for reach every weight: no loss would leave one without a gradient.
    assert all(p.grad is not None for p in backbone.parameters())


def test_levels_by_number():
    config = hf.InternImageConfig(**STYLES["t"], out_indices=(2, 4))
    assert config.out_features == ["stage2", "stage4"]
    assert AutoBackbone.from_config(config).channels == [32, 128]
    with pytest.raises(ValueError, match="stage5"):
        hf.InternImageConfig(**STYLES["t"], out_features=["stage5"])


def test_what_a_folder_does_not_have_is_initialised(tmp_path: Path):
    folder = tmp_path / "encoder"
    write_published(folder, "h")
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in load_file(folder / "model.safetensors").items()
        if "mask.weight" not in name and "q_bias" not in name and "center" not in name
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    own = loaded.state_dict()
    new = {name for name in own if hub_name(name.removeprefix("model.")) not in state}
    assert new == set(report["missing_keys"])
    for name in new:
        assert not own[name].any(), name  # all of these start at zero
    head = own["model.head.weight"]
    assert head.shape[0] == 3
    assert 0.01 < head.float().std() < 0.03
    kept = own.keys() - new - {"model.head.weight", "model.head.bias"}
    assert len(kept) > 100
    for name in kept:
        assert torch.equal(own[name], state[hub_name(name.removeprefix("model."))]), name


def test_every_weight_starts_as_in_the_constructor(tmp_path: Path):
    hf.InternImageConfig(**STYLES["b"], num_labels=CLASSES).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(3)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    own = InternImage(**STYLES["b"], num_classes=CLASSES).state_dict()
    for name, value in own.items():
        other = loaded[f"model.{name}"].float()
        assert torch.isfinite(other).all(), name
        if value.float().std(unbiased=False) == 0:
            assert torch.equal(other, value.float()), name
        elif value.numel() > 500:
            assert other.std() == pytest.approx(value.std().item(), rel=0.2), name


def segmenter(kind: str) -> Any:
    """A tiny segmenter around a tiny backbone."""
    torch.manual_seed(0)
    backbone = hf.InternImageConfig(**STYLES["b"], out_features=LEVELS)
    if kind == "upernet":
        config = UperNetConfig(
            backbone_config=backbone, hidden_size=16, num_labels=4, auxiliary_in_channels=64,
            auxiliary_channels=8, pool_scales=[1, 2],
        )  # fmt: skip
        return UperNetForSemanticSegmentation(config)
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=4, feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=3,
        num_attention_heads=2, dim_feedforward=32, num_queries=6, train_num_points=32,
    )  # fmt: skip
    return Mask2FormerModel(config)  # the class with a loss needs SciPy


def loss_of(kind: str, model: Any) -> Any:
    """A loss that all levels reach."""
    if kind == "upernet":
        return model(IMAGES, labels=torch.arange(4).repeat(2, 64, 16)).loss
    return sum(x.square().mean() for x in model(IMAGES).masks_queries_logits)


@pytest.mark.parametrize("kind", ["mask2former", "upernet"])
def test_segmenters_of_transformers_train_it(kind: str, tmp_path: Path):
    model = segmenter(kind)
    loss_of(kind, model.train()).backward()
    backbone = next(m for m in model.modules() if isinstance(m, hf.InternImageBackbone))
    gradients = {name: p.grad for name, p in backbone.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    # Composite models turn checkpointing on by setting the flag of their parts.
    model._set_gradient_checkpointing(True)
    assert all(stage.checkpoint_blocks for stage in backbone.model.levels)
    model.save_pretrained(tmp_path)
    assert any("layer_scale1" in name for name in load_file(tmp_path / "model.safetensors"))
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(kind, again), loss_of(kind, model.eval()))


def test_checkpointing_changes_memory_only():
    models = []
    for checkpointed in (False, True):
        model = AutoModelForImageClassification.from_config(
            hf.InternImageConfig(**STYLES["b"], num_labels=CLASSES, with_cp=checkpointed)
        )
        model.model.load_state_dict(random_model("b").state_dict())
        assert model.gradient_checkpointing is checkpointed
        model(IMAGES, labels=torch.tensor([0, 1])).loss.backward()
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one.grad, other.grad)
    models[1].gradient_checkpointing_disable()
    assert not models[1].gradient_checkpointing
    with pytest.raises(ValueError, match="every block"):
        models[1].activation_checkpointing_enable(every_n_layers=2)


def test_a_configuration_has_every_option_and_the_published_defaults():
    options = hf.InternImageConfig().options()
    parameters = inspect.signature(InternImage).parameters
    runtime = {"num_classes", "fused_offset_branch", "half_blend"}
    assert options.keys() == parameters.keys() - runtime
    sizes = {"channels", "depths", "groups"}
    for name in options.keys() - sizes:
        assert options[name] == parameters[name].default, name
    assert (options["channels"], hf.InternImageConfig().num_labels) == (64, 1000)
    for classes in (1, 2, 7, 1000):
        saved = hf.InternImageConfig(num_classes=classes).to_diff_dict()
        assert hf.InternImageConfig(**saved).num_labels == classes


@pytest.mark.parametrize(
    ("name", "value"),
    [("core_op", "DCNv4"), ("norm_layer", "BN"), ("drop_rate", 0.1), ("cls_scale", 2.0)],
)
def test_options_that_are_not_implemented_are_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        hf.InternImageConfig(**{name: value})


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_published(tmp_path, "t")
    with pytest.raises(ValueError, match="would execute"):
        AutoModel.from_pretrained(tmp_path, weights_only=False)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.head.bias": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AutoModel.from_pretrained(tmp_path)
    assert "executed" not in capsys.readouterr().out


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_sizes_that_do_not_fit_the_fused_map(tmp_path: Path):
    write_published(tmp_path, "h")
    for auto in (AutoModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match="image width=48"):
            auto.from_pretrained(tmp_path)(torch.zeros(1, 3, 64, 48))


def test_a_folder_of_a_pretrained_backbone(tmp_path: Path):
    model = random_model("h", num_classes=0)
    config = {"model_type": "internimage", **STYLES["h"], "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64},
                 "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    state = {hub_name(name): value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES).pooler_output, model.forward_embedding(IMAGES))
    # Found by the configuration, since preprocessor_config.json does not name a class.
    images = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(images).__name__ == "CLIPImageProcessor"
    image = np.full((90, 70, 3), 255, dtype=np.uint8)
    pixels = images(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))
