"""A plain ViT as the backbone of a detector: ViTDet (arXiv 2203.16527).

Local attention in windows, global attention in a few blocks, and relative positions are those of
transformers' VitDet; everything else is our ViT with its names, so that pre-trained weights fit by
name.  `transformers_name` gives the names of `transformers.VitDetBackbone`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from transformers import VitDetConfig
from transformers.models.vitdet.modeling_vitdet import (
    VitDetAttention,
    window_partition,
    window_unpartition,
)

from m3i_scale.models.layers import init_transformer, require_divisible
from m3i_scale.models.vit import ViT


class WindowAttention(VitDetAttention):
    """Attention over a map (B, h, w, C), whole or in windows; padded windows see zeros, too."""

    def __init__(
        self, width: int, heads: int, grid: int, window: int, *, relative_positions: bool
    ) -> None:
        config = VitDetConfig(
            hidden_size=width,
            num_attention_heads=heads,
            use_relative_position_embeddings=relative_positions,
        )
        side = window or grid
        super().__init__(config, input_size=(side, side))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) to the same shape."""
        if not self.window:
            return super().forward(x)[0]
        height, width = x.shape[1:3]
        windows, padded = window_partition(x, self.window)
        return window_unpartition(super().forward(windows)[0], self.window, padded, (height, width))


class WindowedViT(ViT):
    """Our ViT with windows and relative positions; the same function where both are off.

    Args:
        grid: patches along the side of a training image: the length of relative positions in
            global blocks, interpolated for other sizes.
        window, global_blocks: side of the windows in patches, 0 for none, and the blocks without.
        relative_positions: learned, zero at the start.
        heads, options: of `ViT`.
    """

    def __init__(
        self,
        *,
        grid: int,
        heads: int = 12,
        window: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        relative_positions: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(heads=heads, **options)
        outside = [block for block in global_blocks if block >= len(self.blocks)]
        if window and outside:
            raise ValueError(
                f"windows.global_blocks names block {outside[0]}, and this ViT has blocks 0 to "
                f"{len(self.blocks) - 1}"
            )
        del self.attention_pool  # nothing is pooled here
        for number, block in enumerate(self.blocks):
            block.attn = WindowAttention(
                self.width,
                heads,
                grid,
                0 if number in global_blocks else window,
                relative_positions=relative_positions,
            )
            block.attn.apply(init_transformer)

    def feature_map(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to (B, h, w, D), after the last norm."""
        x = self.embed(images).unflatten(1, self.grid_size(*images.shape[-2:]))
        last = deque(self.after_each_block(x, keys), maxlen=1)
        return self.norm(last.pop())

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """The same as tokens (B, N, D), row-major."""
        return self.feature_map(images, keys).flatten(1, 2)


class SimpleFeaturePyramid(nn.Module):
    """The map of a ViT (B, h, w, D) -> maps (B, C, ., .) of twice up to once its strides.

    For patches of 16 pixels the strides are 4, 8, 16 and 32.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        require_divisible("width", width, "the finest map's reduction", 4)
        half, quarter = width // 2, width // 4
        self.levels = nn.ModuleList(
            nn.Sequential(*resize, *_projection(wide, channels))
            for wide, resize in (
                (quarter, [_up(width, half), LayerNorm2d(half), nn.GELU(), _up(half, quarter)]),
                (half, [_up(width, half)]),
                (width, []),
                (width, [nn.MaxPool2d(2)]),
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Four maps, the finest first."""
        x = x.permute(0, 3, 1, 2)
        return [level(x) for level in self.levels]


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 2, 2)


def _projection(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 1, bias=False),
        LayerNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        LayerNorm2d(outputs),
    ]


def transformers_name(name: str) -> str:
    """Of a parameter of `WindowedViT`, the name in `transformers.VitDetBackbone`.

    The last norm has none there.
    """
    name = name.replace("patch_embed.proj.", "embeddings.projection.")
    return re.sub(
        r"^blocks\.(\d+)\.(attn\.)?",
        lambda found: f"encoder.layer.{found[1]}." + ("attention." if found[2] else ""),
        name,
    )
