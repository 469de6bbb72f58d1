"""Factors of the learning rate by layer: ViT's and InternImage's rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.intern_image import intern_image
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.models.vit import ViT

RATE = 0.5


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def tiny_vit() -> ViT:
    return ViT(width=16, depth=3, heads=2, pool_heads=2, embed_dim=8)


def test_vit():
    networks = Detector(tiny_vit())
    scales = layer_scales(networks, RATE)
    assert list(scales) == [name for name, _ in networks.named_parameters()]
    expected = {"patch_embed": 0.5**4, "norm": 1.0, "attention_pool": 1.0}
    for name, scale in scales.items():
        parts = name.split(".")
        if parts[0] == "head":
            assert scale == 1.0
        elif parts[1] == "blocks":
            assert scale == 0.5 ** (3 - int(parts[2]))
        else:
            assert scale == expected[parts[1]], name


def published_rule(depths: list[int], rate: float) -> dict[str, float]:
    """Factors that InternImage's authors fine-tune classifiers with, by the start of a name.

    Of their program; norms between blocks are not in their table.
    """
    last_first = [
        (stage, block) for stage in (3, 2, 1, 0) for block in reversed(range(depths[stage]))
    ]
    table = {f"levels.{s}.blocks.{b}.": rate**i for i, (s, b) in enumerate(last_first)}
    table["patch_embed."] = table["levels.0.blocks.0."]
    for stage in range(3):
        for part in ("downsample", "norm"):
            table[f"levels.{stage}.{part}."] = table[f"levels.{stage + 1}.blocks.0."]
    return table


def test_intern_image_h_is_fine_tuned_as_its_authors_do():
    with torch.device("meta"):
        network = intern_image("h")
    rate, depths = 0.9, [6, 6, 32, 6]
    scales = layer_scales(network, rate, deformation=0.1, own_ends=False)
    table = published_rule(depths, rate)
    used = set()
    for name, scale in scales.items():
        start = next((start for start in table if name.startswith(start)), None)
        used.add(start)
        expected = table[start] if start else 1.0
        if "post_norms" in name:  # after blocks 5, 11, 17, 23, 29 of the third stage
            after = (5, 11, 17, 23, 29)[int(name.split(".")[3])]
            expected = table[f"levels.2.blocks.{after}."]
        if "offset" in name or "center_feature_scale_proj" in name:
            expected *= 0.1
        assert scale == pytest.approx(expected, rel=1e-12), name
    assert used >= set(table)


def test_intern_image_in_a_detector_counts_stem_and_head_as_layers():
    options = {"channels": 8, "depths": [1, 2, 3, 1], "groups": [1, 1, 2, 2]}
    backbone = build_backbone("intern_image", **options, clip_projector_width=16, clip_heads=2)
    assert isinstance(backbone, nn.Module)
    scales = layer_scales(Detector(backbone), RATE)
    assert scales["backbone.patch_embed.conv1.weight"] == RATE**8
    assert scales["backbone.levels.0.blocks.0.dcn.offset.weight"] == RATE**7
    assert scales["backbone.levels.0.downsample.conv.weight"] == RATE**6
    assert scales["backbone.levels.1.blocks.0.norm1.0.weight"] == RATE**6
    assert scales["backbone.levels.3.norm.0.weight"] == RATE
    assert scales["backbone.dcnv3_head_x4.0.weight"] == 1.0
    assert scales["backbone.dcnv3_head_x3.bias"] == 1.0
    assert scales["head.weight"] == 1.0


def test_each_of_two_backbones_has_its_layers():
    networks = nn.ModuleDict({"first": tiny_vit(), "second": Detector(tiny_vit())})
    scales = layer_scales(networks, RATE)
    assert scales["first.blocks.0.norm1.weight"] == RATE**3
    assert scales["second.backbone.blocks.0.norm1.weight"] == RATE**3
    assert layer_scales(tiny_vit(), RATE)["blocks.0.norm1.weight"] == RATE**3


def test_no_decay_and_impossible_decay():
    assert set(layer_scales(tiny_vit(), 1.0).values()) == {1.0}
    for decay in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            layer_scales(tiny_vit(), decay)
    with pytest.raises(ValueError, match="deformation"):
        layer_scales(tiny_vit(), 0.9, deformation=0.0)
