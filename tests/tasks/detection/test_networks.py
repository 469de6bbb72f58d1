"""Detectors: gradients in every case, backbones equal to ours, rates of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import VitDetBackbone, VitDetConfig

from helpers import coco as small
from m3i_scale.config.detection import Detector
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.positions import grid_embedding
from m3i_scale.models.vit import ViT
from m3i_scale.tasks.detection.composite import CompositeInternImage
from m3i_scale.tasks.detection.networks import (
    build_detector,
    layer_scales,
    pretrained_names,
)
from m3i_scale.tasks.detection.vitdet import WindowedViT, transformers_name

VIT = {"width": 32, "depth": 2, "heads": 2}


def built(name: str, **options):
    torch.manual_seed(0)
    return build_detector(small.detector(name, **options), small.data())


@pytest.mark.parametrize("name", small.DETECTORS)
def test_every_parameter_has_a_gradient_with_and_without_objects(name):
    networks = built(name).train()
    keys = []
    for objects in (3, 0, 1):
        networks.zero_grad(set_to_none=True)
        found = networks(small.batch(objects))
        found["loss"].backward()
        missing = [n for n, p in networks.named_parameters() if p.grad is None]
        assert missing == [], objects
        assert all(p.grad.isfinite().all() for p in networks.parameters())
        figures = {k: v for k, v in found.items() if k != "loss"}
        assert all(k.startswith("loss/") and v.shape == (2,) for k, v in figures.items())
        assert not any(v.requires_grad for v in figures.values())
        keys.append(list(found))
    assert keys[0] == keys[1] == keys[2]


def test_regions_show_the_pixels_that_their_boxes_cover():
    # Maps whose values are the horizontal places of their cells' centres, in pixels of the image.
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    maps = {
        level: (torch.arange(512 // stride) + 0.5).mul(stride).expand(1, 32, 512 // stride, -1)
        for level, stride in strides.items()
    }
    boxes = [torch.tensor([[8.0, 8.0, 36.0, 36.0], [101.0, 40.0, 325.0, 264.0]])]
    found = built("vit").roi_heads.box_roi_pool(maps, boxes, [(512, 512)])
    for region, (left, _, right, _) in zip(found, boxes[0].tolist(), strict=True):
        centres = left + (torch.arange(7) + 0.5) * (right - left) / 7
        assert torch.allclose(region[0, 3], centres, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "dino"])
def test_weights_of_bfloat16_keep_boxes_in_float32(name):
    networks = built(name).to(torch.bfloat16).train()
    found = networks(small.batch(2))
    assert found["loss"].dtype == torch.float32
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.parameters())
    networks.eval()
    for one in networks(small.batch(2))["detections"]:
        assert one.boxes.dtype == one.scores.dtype == torch.float32
        # A thousand boxes on a grid of bfloat16 would mostly be whole numbers.
        assert (one.boxes % 1 > 0).float().mean() > 0.5


@pytest.mark.parametrize("name", ["vit", "intern_image", "dino", "composite"])
def test_detections_lie_in_the_stored_image(name):
    networks = built(name).eval()
    batch = small.batch(2)
    for found, (height, width) in zip(networks(batch)["detections"], batch.originals, strict=True):
        assert len(found) > 0
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert ((found.labels >= 0) & (found.labels < small.CATEGORIES)).all()
        assert (found.scores.diff() <= 1e-6).all()
        assert (found.masks is None) == (name in ("dino", "composite"))
        if found.masks is not None:
            assert found.masks.shape == (len(found), height, width)


@pytest.mark.parametrize("name", small.DETECTORS)
def test_what_came_before_makes_no_difference(name):
    def loss(networks) -> torch.Tensor:
        torch.manual_seed(3)
        return networks(small.batch(3))["loss"]

    first, second = built(name).train(), built(name).train()
    tiny = small.batch(0)
    second(replace(tiny, sizes=torch.full_like(tiny.sizes, 20)))
    assert torch.equal(loss(first), loss(second))


def test_a_padded_image_is_seen_as_it_is_alone():
    networks = built("dino").eval()
    both = small.batch(0)
    first = networks(both)["detections"][0]
    alone = replace(
        both,
        images=both.images[:1],
        sizes=both.sizes[:1],
        objects=both.objects[:1],
        originals=both.originals[:1],
        image_ids=both.image_ids[:1],
        key=both.key[:1],
    )
    torch.testing.assert_close(networks(alone)["detections"][0].scores, first.scores)


# ------------------------------------------------------------------------------------------ ViTDet


def windowed(**options) -> WindowedViT:
    torch.manual_seed(0)
    defaults = {"grid": 4, "window": 0, "relative_positions": False}
    return WindowedViT(**{**defaults, **options}, **VIT).eval()


def plain(**options) -> ViT:
    torch.manual_seed(1)
    return ViT(**VIT, **options, pool_heads=2, embed_dim=32).eval()


def load(ours: WindowedViT, vit: ViT) -> None:
    own = ours.state_dict()
    weights = {n: w for n, w in vit.state_dict().items() if not n.startswith("attention_pool.")}
    assert {n for n in own if "rel_pos" not in n} == set(weights)
    ours.load_state_dict(weights, strict=False)


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("relative", [False, True])
def test_without_windows_it_is_our_vit(size, relative):
    vit, ours = plain(), windowed(relative_positions=relative)
    load(ours, vit)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours.features(images), vit.features(images), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (128, 96)])
def test_positions_are_stretched_as_in_our_vit(size):
    vit, ours = plain(position_grid=4), windowed(position_grid=4)
    load(ours, vit)
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(ours.features(images), vit.features(images), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_windows_and_relative_positions_are_those_of_transformers(size):
    rows, columns = size[0] // 16, size[1] // 16
    ours = windowed(window=3, global_blocks=[1], relative_positions=True)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "rel_pos" in name:
                parameter.normal_()
    config = VitDetConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        window_size=3,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
        out_features=["stage2"],
    )
    theirs = VitDetBackbone(config).eval()
    named = {transformers_name(n): w for n, w in ours.state_dict().items()}
    named = {n: w for n, w in named.items() if not n.startswith("norm.")}
    missing, unknown = theirs.load_state_dict(named, strict=False)
    assert (missing, unknown) == (["embeddings.position_embeddings"], [])
    nn.init.zeros_(theirs.embeddings.position_embeddings)
    images = torch.randn(2, 3, *size)
    positions = grid_embedding((rows, columns), 32).T.unflatten(1, (rows, columns))
    theirs.embeddings.register_forward_hook(lambda module, given, result: result + positions)
    wanted = ours.norm(theirs(images).feature_maps[0].permute(0, 2, 3, 1))
    torch.testing.assert_close(ours.feature_map(images), wanted, atol=1e-5, rtol=1e-4)


def test_names_of_a_vit_detector_are_those_of_the_pretrained_vit():
    vit = ViT(**VIT, pool_heads=2, embed_dim=32).state_dict()
    own = {n: p.shape for n, p in built("vit").named_parameters() if n.startswith("backbone.")}
    names = pretrained_names(vit)
    assert set(names) == {n for n in own if "rel_pos" not in n}
    assert all(own[n] == vit[theirs].shape for n, theirs in names.items())


def test_impossible_windows_and_sizes_end_in_a_sentence():
    options = {"backbone": small.VIT, "head": small.MASK_RCNN, "categories": 5}
    outside = Detector.model_validate(options)  # block 11 of 2
    with pytest.raises(ValueError, match="names block 2, and"):
        build_detector(outside, small.data())
    with pytest.raises(ValueError, match="multiple of 32"):
        build_detector(small.detector("vit"), small.data(resize={"kind": "jitter", "size": 72}))


def test_dino_needs_stages():
    with pytest.raises(ValueError, match=r"head\.kind dino needs the stages"):
        Detector.model_validate({"backbone": small.VIT, "head": small.DINO, "categories": 5})


# --------------------------------------------------------------------------------------- composite


def test_both_backbones_of_a_composite_start_equal():
    torch.manual_seed(0)
    options = {"channels": 8, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]}
    pair = CompositeInternImage(**options, num_classes=0).eval()
    single = InternImage(**options, num_classes=0).eval()
    single.load_state_dict({n: pair.state_dict()[n] for n in single.state_dict()})
    images = torch.randn(2, 3, 64, 96)
    first, second = pair.forward_pair(images)
    for one, other, alone in zip(first, second, single.forward_stages(images), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, alone)
    with torch.no_grad():
        pair.mixing[2].gamma.fill_(0.1)
    _, changed = pair.forward_pair(images)
    assert torch.equal(changed[1], second[1])
    assert not torch.allclose(changed[2], second[2])


@pytest.mark.parametrize("projector", [False, True])
def test_weights_of_one_backbone_become_those_of_both(projector):
    networks = built("composite").eval()
    options = small.INTERN_IMAGE["options"] | {"clip_projector_width": 32, "clip_heads": 4}
    torch.manual_seed(5)
    single = InternImage(**options, num_classes=0, use_clip_projector=projector).eval()
    names = pretrained_names(single.state_dict(), composite=True)
    own = dict(networks.named_parameters())
    with torch.no_grad():
        for name, theirs in names.items():
            own[name].copy_(single.state_dict()[theirs])
    other = {n for n in own if n.startswith("backbone.")} - set(names)
    assert all(n.startswith("backbone.mixing.") for n in other)
    images = torch.randn(1, 3, 64, 64)
    pair = networks.backbone.forward_pair(images)
    for first, second, alone in zip(*pair, single.forward_stages(images), strict=True):
        torch.testing.assert_close(first, alone)
        assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------- rates


def test_rates_decay_with_the_depth():
    scales = layer_scales(built("vit"), 0.5)
    assert scales["backbone.patch_embed.proj.weight"] == 0.125
    assert scales["backbone.blocks.0.attn.qkv.weight"] == 0.25
    assert scales["backbone.blocks.1.attn.rel_pos_h"] == 0.5
    assert scales["backbone.norm.weight"] == scales["neck.levels.0.0.weight"] == 1
    assert set(scales) == {name for name, _ in built("vit").named_parameters()}


def test_rates_of_intern_image_follow_its_recipe():
    scales = layer_scales(built("composite"), 0.5, deformation=0.01, sampling=0.03)
    # Five blocks; what stands between two stages belongs to the first block of the next.
    for network in ("levels", "second"):
        assert scales[f"backbone.{network}.0.blocks.0.mlp.fc1.weight"] == 0.5**5
        assert scales[f"backbone.{network}.0.downsample.conv.weight"] == 0.5**4
        assert scales[f"backbone.{network}.2.blocks.1.mlp.fc1.weight"] == 0.5**2
        assert scales[f"backbone.{network}.2.norm.0.weight"] == 0.5
        assert scales[f"backbone.{network}.3.norm.0.weight"] == 0.5
        assert scales[f"backbone.{network}.3.blocks.0.dcn.offset.weight"] == 0.5 * 0.01
    assert scales["backbone.patch_embed.conv1.weight"] == 0.5**6
    assert scales["decoder.layers.0.encoder_attn.sampling_offsets.weight"] == 0.03
    assert scales["decoder.layers.0.encoder_attn.value_proj.weight"] == 1
    assert scales["backbone.mixing.0.gamma"] == 1


def test_blocks_are_recomputed_and_drop_paths_are_drawn():
    backbone = {**small.VIT, "options": {**VIT, "drop_path_rate": 0.5, "checkpoint_blocks": True}}
    config = small.detector("vit").model_copy(
        update={"backbone": small.detector("vit").backbone.model_copy(update=backbone)}
    )
    networks = build_detector(config, small.data()).train()
    vit = networks.backbone
    assert vit.checkpoint_blocks
    assert [block.drop_path.drop_prob for block in vit.blocks] == [0.0, 0.5]
    images = torch.randn(8, 3, 64, 64)
    assert not torch.equal(vit.features(images), vit.features(images))
