"""The backbones of detectors: ours, without what only pre-training uses, under the same names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from m3i_scale.config.detection import Detector, Dino
from m3i_scale.models import layer_decay
from m3i_scale.models.backbone import backbone_options
from m3i_scale.models.intern_image import InternImage
from m3i_scale.tasks.detection.composite import CompositeInternImage
from m3i_scale.tasks.detection.vitdet import WindowedViT

PREFIX = "backbone."
_SECOND, _FIRST = f"{PREFIX}second.", f"{PREFIX}levels."


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
        **merged,
    )


# Of a pre-trained backbone, what a detector has no use for.
_UNUSED = ("dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.", "attention_pool.")


def pretrained_names(names: Iterable[str], *, composite: bool = False) -> dict[str, str]:
    """Parameter of a detector -> the pre-trained backbone's parameter that it starts from.

    `names` are the pre-trained backbone's; both backbones of a composite start from the same one.
    """
    used = [name for name in names if not name.startswith(_UNUSED)]
    found = {PREFIX + name: name for name in used}
    if composite:
        inside = [name for name in used if name.startswith("levels.")]
        found |= {_SECOND + name.removeprefix("levels."): name for name in inside}
    return found


def stage_widths(backbone: InternImage) -> list[int]:
    """Channels of the maps of the stages."""
    channels = backbone.levels[0].blocks[0].mlp.fc1.in_features  # type: ignore[union-attr,index]
    return [int(channels) * 2**stage for stage in range(len(backbone.levels))]


# Of DINO's layers, what says where they sample; the backbone's offsets are known to layer_decay.
_SAMPLING = ".sampling_offsets."


def layer_scales(
    networks: nn.Module, decay: float, *, deformation: float = 1.0, sampling: float = 1.0
) -> dict[str, float]:
    """Parameter name -> factor of its learning rate.

    As `models.layer_decay.layer_scales`; both backbones of a composite have the same factors, and
    DINO's sampling offsets have `sampling`.
    """
    scales = layer_decay.layer_scales(networks, decay, deformation=deformation)
    for name in scales:
        if name.startswith(_SECOND):
            scales[name] = scales[_FIRST + name.removeprefix(_SECOND)]
        elif _SAMPLING in name:
            scales[name] *= sampling
    return scales
