"""UperNet and Mask2Former on tiny backbones: gradients, losses, names, precision."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mask2former import modeling_mask2former as theirs

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import IGNORED, SegmentationModel
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.profiling.forward import backbone_flops
from m3i_scale.tasks.segmentation import mask2former
from m3i_scale.tasks.segmentation.build import build_networks, segmenter_flops
from m3i_scale.tasks.segmentation.mask2former import (
    DeformableAttention,
    Mask2FormerSegmenter,
    Positions,
    split_mask,
)
from m3i_scale.tasks.segmentation.networks import Inputs, Segmenter
from m3i_scale.tasks.segmentation.upernet import FeatureDropout, RegionMeans

CLASSES, SIDE = 5, 64
BACKBONES = {
    "intern_image": {
        "channels": 16,
        "depths": [1, 1, 2, 1],
        "groups": [1, 2, 4, 8],
        "clip_projector_width": 32,
        "clip_heads": 4,
        "clip_embed_dim": 16,
    },
    "vit": {"width": 32, "depth": 4, "heads": 4, "pool_heads": 4, "embed_dim": 16},
}
HEADS: dict[str, dict[str, Any]] = {
    "upernet": {"width": 32, "auxiliary_width": 16},
    "mask2former": {
        "width": 32,
        "heads": 4,
        "queries": 8,
        "encoder_layers": 1,
        "encoder_ffn": 32,
        "decoder_layers": 2,
        "decoder_ffn": 32,
        "points": 64,
    },
}
EMPTY = torch.full((2, SIDE, SIDE), IGNORED, dtype=torch.uint8)


def model(backbone: str, head: str, **changes: Any) -> SegmentationModel:
    return SegmentationModel.model_validate(
        {
            "backbone": {"name": backbone, "options": BACKBONES[backbone]},
            "classes": CLASSES,
            "head": {"kind": head, **HEADS[head], **changes},
        }
    )


def build(backbone: str = "vit", head: str = "upernet", **changes: Any) -> Segmenter:
    torch.manual_seed(0)
    return build_networks(model(backbone, head, **changes), SIDE)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(dtype)


def masks() -> Tensor:
    """Blocks of classes, a quarter without one."""
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(CLASSES, (2, 4, 4), generator=generator).to(torch.uint8)
    blocks[:, :2, :2] = IGNORED
    return blocks.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_trained_parameter_has_a_gradient(backbone: str, head: str, precision: torch.dtype):
    networks = build(backbone, head).to(precision)
    half = masks()
    half[1] = IGNORED
    keys = {}
    for name, labels in {"full": masks(), "half": half, "empty": EMPTY}.items():
        networks.zero_grad(set_to_none=True)
        outputs = networks(Inputs(images(precision), labels, torch.arange(2)))
        outputs["loss"].backward()
        keys[name] = [key for key in outputs if key != "loss"]
        trained = {n: p for n, p in networks.named_parameters() if p.requires_grad}
        without = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
        assert not without
        if name == "full":
            # What predicts offsets starts at zero, so that nothing reaches what lies below it.
            below = (".dw_conv.", "pixel_decoder.level_embed")
            still = [n for n, p in trained.items() if not p.grad.any()]
            assert not [n for n in still if not any(part in n for part in below)]
        assert outputs["loss"].dtype == torch.float32
        assert all(outputs[key].shape == (2,) for key in keys[name])
        assert not any(outputs[key].requires_grad for key in keys[name])
    assert keys["full"] == keys["half"] == keys["empty"]
    with torch.no_grad():
        scores = networks.eval()(Inputs(images(precision)))["scores"]
    assert scores.shape == (2, CLASSES, SIDE, SIDE)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backbone_keeps_its_names(backbone: str, head: str):
    networks = build(backbone, head)
    own = build_backbone(backbone, **BACKBONES[backbone])
    assert isinstance(own, torch.nn.Module)
    prefix = "backbone."
    found = {n: p.shape for n, p in networks.state_dict().items() if n.startswith(prefix)}
    assert found == {prefix + n: p.shape for n, p in own.state_dict().items()}
    frozen = {n.split(".")[1] for n, p in networks.named_parameters() if not p.requires_grad}
    assert frozen == (
        {"attention_pool"}
        if backbone == "vit"
        else {"clip_projector", "dcnv3_head_x3", "dcnv3_head_x4"}
    )
    scales = layer_scales(networks, 0.5)
    assert scales.keys() == {n for n, _ in networks.named_parameters()}
    depth = 4 if backbone == "vit" else 5
    assert min(scales.values()) == 0.5 ** (depth + 1)
    assert {s for n, s in scales.items() if not n.startswith(prefix)} == {1.0}


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """In float64 by numpy: sum over labelled pixels, divided by all pixels."""
    scores = logits.detach().double().numpy()
    scores = scores - scores.max(1, keepdims=True)
    log = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    total = 0.0
    for b, y, x in zip(*np.nonzero(labels.numpy() != IGNORED), strict=True):
        total -= log[b, labels[b, y, x], y, x]
    return total / labels.numel()


def test_the_loss_of_upernet():
    networks = build("intern_image", dropout=0.0)
    seen = {}
    for name in ("decode_head", "auxiliary_head"):
        networks.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output})
        )
    outputs = networks(Inputs(images(), masks()))
    assert seen["decode_head"].shape == (2, CLASSES, SIDE // 4, SIDE // 4)
    assert seen["auxiliary_head"].shape == (2, CLASSES, SIDE // 16, SIDE // 16)
    expected = {
        name: cross_entropy(
            F.interpolate(logits, scale_factor=SIDE // logits.shape[-1], mode="bilinear"), masks()
        )
        for name, logits in seen.items()
    }
    assert outputs["loss/decode"].tolist() == pytest.approx([expected["decode_head"], 1], rel=1e-5)
    auxiliary = expected["auxiliary_head"]
    assert outputs["loss/auxiliary"][0].item() == pytest.approx(auxiliary, rel=1e-5)
    total = expected["decode_head"] + 0.4 * auxiliary
    assert outputs["loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(backbone: str):
    """Stochastic depth and dropout are those of the samples."""
    networks = build(backbone, dropout=0.3)
    labels, keys = masks(), torch.tensor([11, 12])
    labels[1, :32] = IGNORED
    whole = networks(Inputs(images(), labels, keys))["loss"]
    parts = [
        networks(Inputs(images()[i : i + 1], labels[i : i + 1], keys[i : i + 1]))["loss"]
        for i in range(2)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)
    other = networks(Inputs(images(), labels, keys + 2))["loss"]
    assert abs(whole - other) > 1e-6


def test_dropout_of_maps():
    layer = FeatureDropout(0.25, salt=1)
    layer.keys = torch.arange(4)
    x = torch.ones(4, 2000, 2, 3)
    dropped = layer(x)
    assert dropped.flatten(2).std(2).eq(0).all()  # maps as a whole
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    other = FeatureDropout(0.25, salt=2)
    other.keys = layer.keys
    assert not torch.equal(other(x), dropped)
    assert torch.equal(layer.eval()(x), x)


def test_without_the_second_head():
    networks = build(auxiliary_weight=0.0)
    assert not hasattr(networks, "auxiliary_head")
    assert "loss/auxiliary" not in networks(Inputs(images(), masks()))


def criterion_inputs(networks: Mask2FormerSegmenter, labels: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        *before, last = networks.predictions(networks.maps(Inputs(images())))
    split = [split_mask(mask) for mask in labels]
    return {
        **last,
        "mask_labels": [mask for mask, _ in split],
        "class_labels": [present for _, present in split],
        "auxiliary_predictions": before,
    }


def test_the_loss_of_mask2former_on_one_rank_is_that_of_transformers():
    networks = build(head="mask2former")
    assert isinstance(networks, Mask2FormerSegmenter)
    config = mask2former._config(model("vit", "mask2former").head, CLASSES)
    reference = theirs.Mask2FormerLoss(config, {})
    labels = masks()
    inputs = criterion_inputs(networks, labels)
    torch.manual_seed(5)
    found = networks.criterion(**inputs)
    torch.manual_seed(5)
    expected = reference(**inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    torch.manual_seed(5)
    outputs = networks.losses(networks.maps(Inputs(images())), labels, None)
    total = sum(
        {"cross": 2.0, "mask": 5.0, "dice": 5.0}[n.split("_")[1]] * v for n, v in expected.items()
    )
    torch.testing.assert_close(outputs["loss"], total, rtol=1e-4, atol=1e-4)


def test_ranks_normalise_by_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    """The mean of two ranks' losses is that of their batch, one of them without a mask."""
    networks = build(head="mask2former", points=8192)  # drawn; with so many, matches are the same
    assert isinstance(networks, Mask2FormerSegmenter)
    labels = masks()
    labels[1] = IGNORED
    whole = networks.criterion(**criterion_inputs(networks, labels))
    inputs = criterion_inputs(networks, labels)

    def part(i: int) -> dict[str, Any]:
        cut: dict[str, Any] = {k: v[i : i + 1] for k, v in inputs.items() if isinstance(v, Tensor)}
        cut |= {k: inputs[k][i : i + 1] for k in ("mask_labels", "class_labels")}
        before = [{k: v[i : i + 1] for k, v in layer.items()}
                  for layer in inputs["auxiliary_predictions"]]  # fmt: skip
        return cut | {"auxiliary_predictions": before}

    seen: list[Tensor] = []
    monkeypatch.setattr(mask2former, "average", lambda x: seen.append(x) or x)
    for i in range(2):
        networks.criterion(**part(i))
    mean = torch.stack(seen).mean(0)
    assert seen[1][0] == 0
    monkeypatch.setattr(mask2former, "average", lambda x: mean)
    parts = [networks.criterion(**part(i)) for i in range(2)]
    for name in whole:
        value = (parts[0][name] + parts[1][name]) / 2
        tolerance = 1e-5 if "cross_entropy" in name else 0.02
        torch.testing.assert_close(value, whole[name], rtol=tolerance, atol=1e-6)


def test_split_mask():
    mask = torch.tensor([[3, 0], [IGNORED, 3]], dtype=torch.uint8)
    binary, present = split_mask(mask)
    assert present.tolist() == [0, 3]
    assert binary.tolist() == [[[0, 1], [0, 0]], [[1, 0], [0, 1]]]
    binary, present = split_mask(torch.full((2, 2), IGNORED, dtype=torch.uint8))
    assert binary.shape == (0, 2, 2)
    assert present.shape == (0,)


def test_coordinates_are_float32_in_bfloat16():
    wide = (1, 1, 112, 112)
    ours = Positions(512, normalize=True)
    exact = ours(wide, "cpu", torch.float32)
    torch.testing.assert_close(
        exact,
        theirs.Mask2FormerSinePositionEmbedding(512, normalize=True)(wide, "cpu", exact.dtype),
    )
    assert (ours(wide, "cpu", torch.bfloat16).float() - exact).abs().max() < 0.005

    torch.manual_seed(0)
    layer = DeformableAttention(32, 4, n_levels=3, n_points=4)
    reference = theirs.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(32, 4, 3, 4)
    reference.load_state_dict(layer.state_dict())
    shapes = [(14, 14), (28, 28), (56, 56)]
    x = torch.randn(1, sum(h * w for h, w in shapes), 32)
    ratios = torch.ones(1, 3, 2)
    places = theirs.Mask2FormerPixelDecoderEncoderOnly.get_reference_points(shapes, ratios, "cpu")
    arguments: dict[str, Any] = {
        "reference_points": places,
        "spatial_shapes_list": shapes,
        "position_embeddings": torch.randn_like(x),
    }
    found = layer(x, encoder_hidden_states=x, **arguments)[0]
    expected = reference(x, encoder_hidden_states=x, **arguments)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    half = x.bfloat16()
    arguments["position_embeddings"] = arguments["position_embeddings"].bfloat16()
    coarse = layer.bfloat16()(half, encoder_hidden_states=half, **arguments)[0]
    assert (coarse.float() - found).norm() / found.norm() < 0.03


def test_impossible_networks(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"data.crop 48 is not a multiple of 32"):
        build_networks(model("vit", "upernet"), 48)
    with pytest.raises(ConfigError, match=r"data.crop 32 leaves Mask2Former one pixel"):
        build_networks(model("vit", "mask2former"), 32)
    for blocks in ([0, 1, 2], [0, 1, 2, 4]):
        chosen = model("vit", "upernet").model_copy(update={"blocks": blocks})
        with pytest.raises(ConfigError, match=r"must be four blocks of this ViT, from 0 to 3"):
            build_networks(chosen, SIDE)
    chosen = model("intern_image", "upernet").model_copy(update={"blocks": [0, 1, 2, 3]})
    with pytest.raises(ConfigError, match="belongs to a ViT"):
        build_networks(chosen, SIDE)
    for wrong in ({"width": 40}, {"width": 32, "heads": 5}):
        with pytest.raises(ValueError, match="multiple of"):
            model("vit", "mask2former", **wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'm3i-scale\[transfer\]'"):
        build(head="mask2former")


def test_the_blocks_of_vit_b():
    chosen = model("vit", "upernet")
    options = {**BACKBONES["vit"], "depth": 12}
    deep = chosen.model_copy(
        update={"backbone": chosen.backbone.model_copy(update={"options": options})}
    )
    assert build_networks(deep, SIDE).blocks == [3, 5, 7, 11]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_flops_are_those_of_backbone_and_head(backbone: str, head: str):
    spec = model(backbone, head)
    whole = segmenter_flops(spec, SIDE)
    assert whole > 1.1 * backbone_flops(spec.backbone, SIDE) * (0.5 if backbone != "vit" else 1)
    assert segmenter_flops(spec, 2 * SIDE) > 3 * whole


@pytest.mark.parametrize("size", [(16, 16), (7, 9), (2, 3), (5, 1)])
@pytest.mark.parametrize("regions", [1, 2, 3, 6])
def test_means_of_regions_are_those_of_adaptive_pooling(size: tuple[int, int], regions: int):
    x = torch.randn(2, 3, *size, requires_grad=True)
    found, expected = RegionMeans(regions)(x), torch.nn.AdaptiveAvgPool2d(regions)(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
