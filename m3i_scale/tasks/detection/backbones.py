"""The backbones of detectors: ours, without what only pre-training uses, under the same names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from m3i_scale.config.detection import Detector, Dino
from m3i_scale.models.backbone import backbone_options
from m3i_scale.models.intern_image import InternImage
from m3i_scale.tasks.detection.composite import CompositeInternImage
from m3i_scale.tasks.detection.vitdet import WindowedViT

PREFIX = "backbone."


def build_backbone(config: Detector, image_size: int) -> InternImage | WindowedViT:
    """The backbone of a detector for training images of `image_size` pixels.

    Raises:
        ValueError: the name or an option is unknown, or they do not fit together.
    """
    name, options = config.backbone.name, dict(config.backbone.options)
    build, merged = backbone_options(name, options)
    if build is InternImage:
        merged |= {"use_clip_projector": False, "num_classes": 0}
        composite = isinstance(config.head, Dino) and config.head.composite
        return (CompositeInternImage if composite else InternImage)(**merged)
    patch = int(merged.get("patch_size", 16))
    if image_size % (2 * patch):
        raise ValueError(
            f"training images of {image_size} pixels must be a multiple of {2 * patch}, twice the "
            f"patches of {name}"
        )
    windows = config.windows
    return WindowedViT(
        grid=image_size // patch,
        window=windows.size,
        global_blocks=windows.global_blocks,
        relative_positions=windows.relative_positions,
        pretraining_grid=windows.pretraining_grid,
        **merged,
    )


def pretrained_names(networks: nn.Module) -> dict[str, str]:
    """Parameter of a detector -> the pre-trained backbone's parameter that it starts from.

    Both backbones of a composite start from the same one.
    """
    names = {}
    for name, _ in networks.named_parameters():
        if not name.startswith(PREFIX):
            continue
        own = re.sub(r"^second\.", "levels.", name.removeprefix(PREFIX))
        if ".rel_pos_" not in own and not own.startswith("mixing."):
            names[name] = own
    return names


def stage_widths(backbone: InternImage) -> list[int]:
    """Channels of the maps of the stages."""
    channels = backbone.levels[0].blocks[0].mlp.fc1.in_features  # type: ignore[union-attr,index]
    return [int(channels) * 2**stage for stage in range(len(backbone.levels))]


def depth_of(backbone: nn.Module) -> int:
    """Blocks of a backbone, one after the other."""
    return len(backbone.blocks) if isinstance(backbone, WindowedViT) else sum(_depths(backbone))


def _depths(backbone: Any) -> list[int]:
    return [len(level.blocks) for level in backbone.levels]


def layer_number(backbone: nn.Module, name: str) -> int:
    """How deep a parameter of the backbone lies: 0 patch embedding, 1 first block, ...

    Of an InternImage, what stands between two stages belongs to the first block of the next one.
    """
    if isinstance(backbone, WindowedViT):
        found = re.match(r"blocks\.(\d+)\.", name)
        if found:
            return int(found[1]) + 1
        return depth_of(backbone) + 1 if name.startswith("norm.") else 0
    if name.startswith("mixing."):
        return depth_of(backbone) + 1
    found = re.match(r"(?:levels|second)\.(\d+)\.(?:blocks\.(\d+)\.)?", name)
    if not found:
        return 0
    stage, depths = int(found[1]), _depths(backbone)
    before = sum(depths[:stage])
    inside = depths[stage] if found[2] is None else int(found[2])
    return before + inside + 1


# Parts of names of the layers that say where a deformable layer samples.
_OFFSETS = re.compile(r"\.dcn\.offset\.|\.center_feature_scale_proj|\.sampling_offsets\.")


def layer_scales(networks: nn.Module, decay: float) -> dict[str, float]:
    """Parameter name -> factor of its learning rate: layer decay, and `offset_rate`.

    A head has 1, the deepest block of the backbone `decay`, the one before `decay` ** 2, and so on
    (arXiv 2203.16527, table 13; for InternImage-H 50 blocks at 0.94).
    """
    backbone, rate = networks.backbone, float(networks.offset_rate)  # type: ignore[arg-type]
    assert isinstance(backbone, nn.Module)
    deepest = depth_of(backbone) + 1
    scales = {}
    for name, _ in networks.named_parameters():
        inside = name.startswith(PREFIX)
        layer = layer_number(backbone, name.removeprefix(PREFIX)) if inside else deepest
        scale = decay ** (deepest - layer)
        scales[name] = scale * rate if _OFFSETS.search(f".{name}") else scale
    return scales
