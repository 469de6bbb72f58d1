"""The networks may be built under a context that splits parameters as constructors return."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.ranks import run_ranks
from m3i_scale.cluster.launch import World
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.category_head import CategoryHead
from m3i_scale.models.image_decoder import ImageDecoder
from m3i_scale.models.text_tower import TextTower


def build() -> nn.ModuleList:
    torch.manual_seed(0)
    intern_image = build_backbone(
        "intern_image",
        channels=16,
        depths=[1] * 4,
        groups=[1, 2, 4, 8],
        center_feature_scale=True,
        clip_projector_width=32,
        clip_heads=4,
    )
    return nn.ModuleList(
        [
            intern_image,
            build_backbone("vit", width=32, depth=1, heads=4, pool_heads=4, embed_dim=20),
            ImageDecoder(32, out_width=32, width=32, depth=1, heads=4, ffn=64, head="xavier"),
            TextTower(50, embed_dim=768, width=32, depth=1, heads=4, ffn=64, max_length=512),
            CategoryHead(20, 5),
        ]
    )


def names_that_differ(world: World, folder: Path) -> tuple[int, list[str]]:
    """How many parameters were compared, and those whose shard is not the plain initial value."""
    import deepspeed

    expected = {name: p.detach() for name, p in build().named_parameters()}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build()
    shards = {
        name: p.ds_tensor[: p.ds_numel].view(p.ds_shape) for name, p in model.named_parameters()
    }
    assert shards.keys() == expected.keys()
    return len(shards), [name for name in shards if not torch.equal(shards[name], expected[name])]


@pytest.mark.distributed
def test_initial_weights_do_not_depend_on_sharding(tmp_path: Path):
    ((compared, different),) = run_ranks(1, names_that_differ, tmp_path)
    assert compared > 100
    assert different == []
