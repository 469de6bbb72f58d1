"""A backbone of `m3i_scale.models`, four maps of it, and a head that turns them into classes.

Parameters of the backbone are called `backbone.` and their name in the backbone, so that weights of
pre-training load by name.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import IGNORED, SegmentationData, SegmentationModel
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.vit import ViT
from m3i_scale.tasks.pixels import normalised_pixels
from m3i_scale.tasks.segmentation.dataset import Batch

Norm = Callable[[int], nn.Module]


@dataclass
class Inputs:
    """What the networks take.

    images  float (B, 3, H, W), normalised
    masks   uint8 (B, H, W), `IGNORED` where there is no class; None: scores are wanted
    keys    int64 (B,), of which random numbers in training are functions; None: the default
            generator draws
    """

    images: Tensor
    masks: Tensor | None = None
    keys: Tensor | None = None


def inputs_of(
    batch: Batch, data: SegmentationData, dtype: torch.dtype, keys: Tensor | None = None
) -> Inputs:
    """Normalise a batch that is on the networks' device."""
    images = normalised_pixels(batch.images, data.mean, data.std)
    return Inputs(images.to(dtype), batch.masks, keys)


class Segmenter(nn.Module):
    """The backbone, its four maps, and what heads share.

    Attributes:
        classes: their number C.
        multiple: sides of images must be multiples of it.
        channels: of the four maps, strides 4 to 32.
    """

    def __init__(self, model: SegmentationModel, norm: Norm) -> None:
        super().__init__()
        self.classes = model.classes
        backbone = build_backbone(model.backbone.name, **model.backbone.options)
        assert isinstance(backbone, InternImage | ViT)
        self.backbone = backbone
        _freeze_unused(backbone)
        if isinstance(backbone, ViT):
            self.multiple = 2 * backbone.stride
            self.blocks = _chosen_blocks(model.blocks, len(backbone.blocks))
            self.channels = [backbone.width] * 4
            self.neck = TokenPyramid(backbone.width, norm)
        else:
            if model.blocks is not None:
                raise ConfigError("model.blocks belongs to a ViT; remove it")
            self.multiple = 32
            first = backbone.patch_embed.conv2.out_channels
            self.channels = [first * 2**i for i in range(4)]

    def maps(self, inputs: Inputs) -> list[Tensor]:
        """Four maps (B, C, h, w) of the images, strides 4, 8, 16, 32."""
        backbone = self.backbone
        if isinstance(backbone, InternImage):
            stages = backbone.forward_stages(inputs.images, inputs.keys)
            return [x.permute(0, 3, 1, 2).contiguous() for x in stages]
        grid = backbone.grid_size(*inputs.images.shape[-2:])
        tokens = backbone.features_after(inputs.images, self.blocks, inputs.keys)
        return self.neck([x.transpose(1, 2).unflatten(2, grid) for x in tokens])

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """Losses and figures as (sum, count); without masks `scores` (B, C, H, W), float32."""
        maps = self.maps(inputs)
        if inputs.masks is None:
            return {"scores": self.scores(maps, inputs.images.shape[-2:])}
        return self.losses(maps, inputs.masks, inputs.keys)

    @abstractmethod
    def scores(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """A score of every class at every pixel of an image of that size."""

    @abstractmethod
    def losses(
        self, maps: Sequence[Tensor], masks: Tensor, keys: Tensor | None
    ) -> dict[str, Tensor]:
        """`loss`, and figures as (sum, count)."""


class TokenPyramid(nn.Module):
    """Four maps of a ViT, all of stride 16, to strides 4, 8, 16 and 32, as in BEiT and MAE."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()

        def doubled() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.levels = nn.ModuleList(
            [
                nn.Sequential(doubled(), norm(width), nn.GELU(), doubled()),
                doubled(),
                nn.Identity(),
                nn.MaxPool2d(2, 2),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Resize maps (B, D, h, w) to 4 h, 2 h, h and h / 2."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def group_norm(channels: int) -> nn.Module:
    """GroupNorm of at most 32 groups, eight channels or more in each.

    Pyramid pooling makes maps of one pixel: a group of one channel would be zero there.
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 8, 1)), channels)


NORMS: dict[str, Norm] = {"group": group_norm, "sync_batch": nn.SyncBatchNorm}


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C, h, w), resized to masks (B, H, W): the mean over all pixels.

    Pixels without a class count as zeros, so that every pixel of a batch has one weight however
    the batch is split, and a mask without any class gives 0.
    """
    resized = resize(logits.float(), masks.shape[-2:])
    # Summed apart: on a GPU the operator's own sum over an image adds in any order.
    each = F.cross_entropy(resized, masks.long(), ignore_index=IGNORED, reduction="none")
    return each.sum() / masks.numel()


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with the centres of corner pixels inside the corners."""
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=False)


def _chosen_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    if blocks is None:
        return [
            max(depth // 3, 1) - 1,
            max(depth // 2, 1) - 1,
            max(2 * depth // 3, 1) - 1,
            depth - 1,
        ]
    if len(blocks) != 4 or max(blocks) >= depth:
        raise ConfigError(
            f"model.blocks {list(blocks)}: must be four blocks of this ViT, from 0 to {depth - 1}"
        )
    return list(blocks)


def _freeze_unused(backbone: InternImage | ViT) -> None:
    """No loss reaches the pooling and the fused map; they stay, as their names are in the files."""
    names = ("attention_pool", "clip_projector", "dcnv3_head_x3", "dcnv3_head_x4")
    for name in names:
        if hasattr(backbone, name):
            getattr(backbone, name).requires_grad_(False)
