"""InternImage (arXiv 2211.05778), sizes T to G, with the head of their M3I pre-training.

State-dict names and shapes equal those of the published checkpoints. Every parameter belongs to a
layer that the forward pass calls and none to the class itself, so callers may use the methods below
directly under parameter sharding.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.models.dcn import DCNv3
from m3i_scale.models.layers import (
    Linear,
    ToChannelsFirst,
    ToChannelsLast,
    layer_norm,
    require_divisible,
    run_block,
)
from m3i_scale.models.pooling import AttentionPool
from m3i_scale.models.stochastic_depth import DropPath, draw_uniform, drop_path_rates


def _variant(
    channels: int, depths: Sequence[int], groups: Sequence[int], drop_path_rate: float, **rest: Any
) -> Mapping[str, Any]:
    stages = {"channels": channels, "depths": list(depths), "groups": list(groups)}
    return MappingProxyType({**stages, "drop_path_rate": drop_path_rate, **rest})


_POST_NORM = {"layer_scale": 1e-5, "post_norm": True}
_HUGE = {
    "dw_kernel_size": 5,
    "level2_post_norm": True,
    "center_feature_scale": True,
    "use_clip_projector": True,
}

# The published models, as keyword arguments of `InternImage`: channels, depths, groups, drop path.
INTERN_IMAGE_VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "t": _variant(64, (4, 4, 18, 4), (4, 8, 16, 32), 0.1),
        "s": _variant(80, (4, 4, 21, 4), (5, 10, 20, 40), 0.4, **_POST_NORM),
        "b": _variant(112, (4, 4, 21, 4), (7, 14, 28, 56), 0.5, **_POST_NORM),
        "l": _variant(160, (5, 5, 22, 5), (10, 20, 40, 80), 0.1, offset_scale=2.0, **_POST_NORM),
        "xl": _variant(192, (5, 5, 24, 5), (12, 24, 48, 96), 0.2, offset_scale=2.0, **_POST_NORM),
        "h": _variant(
            320,
            (6, 6, 32, 6),
            (10, 20, 40, 80),
            0.2,
            res_post_norm=True,
            level2_post_norm_block_ids=[5, 11, 17, 23, 29],
            **_HUGE,
        ),
        "g": _variant(
            512,
            (2, 2, 48, 4),
            (16, 32, 64, 128),
            0.4,
            post_norm=True,
            level2_post_norm_block_ids=[5, 11, 17, 23, 29, 35, 41, 47],
            **_HUGE,
        ),
    }
)


def intern_image(name: str, **overrides: Any) -> "InternImage":
    """Build the published variant `name` ('t', 's', 'b', 'l', 'xl', 'h', 'g') with `overrides`."""
    if name not in INTERN_IMAGE_VARIANTS:
        raise ValueError(f"InternImage {name!r}: must be one of {', '.join(INTERN_IMAGE_VARIANTS)}")
    return InternImage(**{**INTERN_IMAGE_VARIANTS[name], **overrides})


class Stem(nn.Module):
    """Two strided convolutions: images (N, 3, H, W) -> (N, H/4, W/4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(ToChannelsLast(), layer_norm(half), ToChannelsFirst())
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ToChannelsLast(), layer_norm(channels))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images."""
        x = self.act(self.norm1(self.conv1(images)))
        return self.norm2(self.conv2(x))


class Downsample(nn.Module):
    """Strided convolution and norm: (N, H, W, C) -> (N, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ToChannelsLast(), layer_norm(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """Halve the resolution, double the channels."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Mlp(nn.Module):
    """Linear, GELU, linear over the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., width)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Two residual branches, deformable convolution and MLP, in one of three norm styles.

    pre-norm            x + gamma * layer(norm(x))
    post-norm           x + gamma * norm(layer(x))
    residual post-norm  x + res_post_norm(layer(norm(x)))

    gamma is the optional layer scale.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        post_norm: bool,
        res_post_norm: bool,
        **dcn: Any,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.Sequential(layer_norm(channels))
        self.dcn = DCNv3(channels, groups, **dcn)
        self.norm2 = nn.Sequential(layer_norm(channels))
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.res_post_norm1 = nn.Sequential(layer_norm(channels)) if res_post_norm else None
        self.res_post_norm2 = nn.Sequential(layer_norm(channels)) if res_post_norm else None
        self.layer_scale = layer_scale
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.empty(channels))
            self.register_parameter(name, gamma)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale; the layers inside reset their own weights."""
        if self.layer_scale is not None:
            for gamma in self.parameters(recurse=False):
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Apply to x (N, H, W, C); `drawn` (2, N): see `DropPath`."""
        first, second = (None, None) if drawn is None else drawn
        x = self._residual(x, first, self.dcn, self.norm1, self.res_post_norm1, self.gamma1)
        return self._residual(x, second, self.mlp, self.norm2, self.res_post_norm2, self.gamma2)

    def _residual(
        self,
        x: Tensor,
        drawn: Tensor | None,
        layer: nn.Module,
        norm: nn.Module,
        res_post_norm: nn.Module | None,
        gamma: Tensor | None,
    ) -> Tensor:
        branch = norm(layer(x)) if self.post_norm else layer(norm(x))
        if res_post_norm is not None:
            branch = res_post_norm(branch)
        if gamma is not None:
            branch = gamma * branch
        return x + self.drop_path(branch, drawn)


class Stage(nn.Module):
    """Blocks at one resolution, optional norms after some of them, then downsampling.

    An extra LayerNorm follows each block in `post_norm_ids` (third stage of H and G).
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        drop_paths: Sequence[float],
        *,
        post_norm_ids: Sequence[int],
        downsample: bool,
        checkpoint_blocks: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_blocks = checkpoint_blocks
        self.post_norm_ids = tuple(post_norm_ids)
        self.blocks = nn.ModuleList(
            Block(channels, groups, drop_path=rate, **block) for rate in drop_paths
        )
        has_norm = not block["post_norm"] or block["center_feature_scale"]
        self.norm = nn.Sequential(layer_norm(channels)) if has_norm else nn.Identity()
        if self.post_norm_ids:
            self.post_norms = nn.ModuleList(
                nn.Sequential(layer_norm(channels)) for _ in self.post_norm_ids
            )
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map x (N, H, W, C) to this stage's features and the next one's input; `draw` drew."""
        for i, block in enumerate(self.blocks):
            own = None if drawn is None else drawn[2 * i : 2 * i + 2]
            x = run_block(block, x, own, checkpointed=self.checkpoint_blocks)
            if i in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(i)](x)
        x = self.norm(x)
        return x, None if self.downsample is None else self.downsample(x)


class InternImage(nn.Module):
    """InternImage of any size; also a `Backbone` when `use_clip_projector` is on.

    channels, depths, groups    width of the first stage (doubling), blocks and groups per stage
    mlp_ratio, offset_scale, dw_kernel_size, remove_center, center_feature_scale   see `DCNv3`
    layer_scale, post_norm, res_post_norm    see `Block`
    level2_post_norm, level2_post_norm_block_ids   norms after these blocks of the third stage
    use_clip_projector   the fused stride-16 map and attention pooling of H and G instead of the
        1x1 `conv_head` of T to XL: `clip_projector_width` wide, pooled by `clip_heads` heads to
        `clip_embed_dim`
    num_classes          0 leaves out the classifier and the norm or convolution that only it uses
    drop_path_rate, drop_path_type   stochastic depth, `linear` over the blocks or `uniform`
    checkpoint_blocks    recompute each block in the backward pass
    fused_offset_branch, half_blend   see `DCNv3`; the first is in H's recipe, measured faster there

    Images are (B, 3, H, W) floats, normalised; any H, W for the stages and logits of T to XL,
    multiples of 32 for the fused map. Bad configurations raise ValueError.
    """

    stride = 16
    head: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        depths: Sequence[int],
        groups: Sequence[int],
        mlp_ratio: float = 4.0,
        offset_scale: float = 1.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        dw_kernel_size: int | None = None,
        remove_center: bool = False,
        center_feature_scale: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        use_clip_projector: bool = False,
        clip_projector_width: int = 1024,
        clip_heads: int = 16,
        clip_embed_dim: int = 768,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        drop_path_type: str = "linear",
        checkpoint_blocks: bool = False,
        fused_offset_branch: bool = False,
        half_blend: bool = False,
    ) -> None:
        super().__init__()
        _check_depths_and_groups(channels, depths, groups)
        _check_norm_style(post_norm, res_post_norm, layer_scale)
        post_norm_ids = _post_norm_ids(level2_post_norm, level2_post_norm_block_ids, depths)
        rates = drop_path_rates(drop_path_rate, sum(depths), drop_path_type)
        self.drop_path_rate = drop_path_rate
        self.num_classes = num_classes
        self.use_clip_projector = use_clip_projector
        self.patch_embed = Stem(channels)
        self.levels = nn.ModuleList(
            Stage(
                channels * 2**i,
                groups[i],
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                post_norm_ids=post_norm_ids if i == 2 else (),
                downsample=i < len(depths) - 1,
                checkpoint_blocks=checkpoint_blocks,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                post_norm=post_norm,
                res_post_norm=res_post_norm,
                offset_scale=offset_scale,
                dw_kernel_size=dw_kernel_size,
                remove_center=remove_center,
                center_feature_scale=center_feature_scale,
                fused_offset_branch=fused_offset_branch,
                half_blend=half_blend,
            )
            for i in range(len(depths))
        )
        if use_clip_projector:
            self._add_clip_head(channels * 8, clip_projector_width, clip_heads, clip_embed_dim)
        elif num_classes:
            self._add_conv_head(channels * 8)

    def _add_clip_head(self, channels: int, width: int, heads: int, embed_dim: int) -> None:
        self.width, self.embed_dim = width, embed_dim
        self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2))
        self.dcnv3_head_x3 = nn.Conv2d(channels // 2, width, 1)
        self.clip_projector = AttentionPool(width, heads, embed_dim)
        if self.num_classes:
            self.fc_norm = nn.Sequential(layer_norm(embed_dim))
            self.head = Linear(embed_dim, self.num_classes)

    def _add_conv_head(self, channels: int) -> None:
        hidden = int(1.5 * channels)
        self.conv_head = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.Sequential(nn.BatchNorm2d(hidden)),
            nn.GELU(),
        )
        self.head = Linear(hidden, self.num_classes)

    @property
    def pooling(self) -> nn.Module:
        """What `pool` adds to the features."""
        return self.clip_projector

    def forward_maps(self, images: Tensor, keys: Tensor | None = None) -> list[Tensor]:
        """Map images to the maps of stem and stages, (N, H, W, C); keys (N,): see `Backbone`."""
        x: Tensor | None = self.patch_embed(images)
        assert x is not None
        maps = [x]
        for level, drawn in zip(self.levels, self.draw(images, keys), strict=True):
            stage, x = level(x, drawn)
            maps.append(stage)
        return maps

    def draw(self, images: Tensor, keys: Tensor | None = None) -> Sequence[Tensor | None]:
        """What stochastic depth of each stage draws (2 * blocks, N); None: nothing is dropped."""
        depths = [len(level.blocks) for level in self.levels]  # type: ignore[arg-type]
        if not (self.training and self.drop_path_rate):
            return [None] * len(depths)
        drawn = draw_uniform(len(images), 2 * sum(depths), keys, images.device)
        return drawn.split([2 * depth for depth in depths])

    def forward_stages(self, images: Tensor, keys: Tensor | None = None) -> list[Tensor]:
        """The four maps of the stages, strides 4 to 32, each before its downsampling."""
        return self.forward_maps(images, keys)[1:]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the stride-16 map of an image of height x width pixels."""
        for name, value in (("height", height), ("width", width)):
            # Stage 4 (stride 32) is shuffled up to stage 3: an odd row would have no counterpart.
            require_divisible(f"image {name}", value, "the stride of the last stage", 32)
        return height // self.stride, width // self.stride

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to the tokens (B, N, D) of the fused stride-16 map, row-major.

        `keys` (B,): see `Backbone`.
        """
        if not self.use_clip_projector:
            raise ValueError(
                "this InternImage has no fused map: build it with use_clip_projector=True"
            )
        self.grid_size(*images.shape[-2:])
        return self.fuse(*self.forward_stages(images, keys)[2:]).flatten(2).transpose(1, 2)

    def fuse(self, stage3: Tensor, stage4: Tensor) -> Tensor:
        """Maps (B, H, W, C) of the last two stages -> the fused stride-16 map (B, D, H, W)."""
        if any(
            coarse * 2 != fine
            for coarse, fine in zip(stage4.shape[1:3], stage3.shape[1:3], strict=True)
        ):
            raise ValueError("image height and width must be multiples of 32 for the fused map")
        x3, x4 = (x.permute(0, 3, 1, 2) for x in (stage3, stage4))
        return self.dcnv3_head_x4(x4) + self.dcnv3_head_x3(x3)

    def pool(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D), all or those where keep (B, N) is True, to (B, E)."""
        return self.clip_projector(tokens, keep)

    def forward_embedding(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the vector (B, E) that the classifier sees.

        In H and G with `num_classes=0` that is the output of the pooling itself.
        """
        if self.use_clip_projector:
            self.grid_size(*images.shape[-2:])
        return self.embed(self.forward_stages(images))

    def embed(self, stages: Sequence[Tensor]) -> Tensor:
        """Of the maps of the four stages, the vector (B, E) that the classifier sees."""
        if not self.use_clip_projector:
            return self.conv_head(stages[3].permute(0, 3, 1, 2)).mean((2, 3))
        pooled = self.pool(self.fuse(*stages[2:]).flatten(2).transpose(1, 2))
        return self.fc_norm(pooled) if self.num_classes else pooled

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        if not self.num_classes:
            raise ValueError("num_classes=0: this InternImage has no classifier")
        return self.head(self.forward_embedding(images))


def _check_depths_and_groups(channels: int, depths: Sequence[int], groups: Sequence[int]) -> None:
    if len(depths) != 4 or len(groups) != 4 or min(depths) < 1:
        raise ValueError(
            f"depths={list(depths)}, groups={list(groups)}: must be four numbers each, depths >= 1"
        )
    require_divisible("channels", channels, "the stem's reduction", 2)
    for i, group in enumerate(groups):
        require_divisible(f"channels of stage {i + 1}", channels * 2**i, f"groups[{i}]", group)


def _check_norm_style(post_norm: bool, res_post_norm: bool, layer_scale: float | None) -> None:
    if res_post_norm and (post_norm or layer_scale is not None):
        raise ValueError(
            f"res_post_norm=True with post_norm={post_norm}, layer_scale={layer_scale}: residual "
            "post-norm goes with pre-norm blocks without layer scale; set post_norm=False, "
            "layer_scale=None"
        )


def _post_norm_ids(
    enabled: bool, ids: Sequence[int] | None, depths: Sequence[int]
) -> tuple[int, ...]:
    if not enabled:
        return ()
    if not ids or not all(0 <= i < depths[2] for i in ids):
        raise ValueError(
            f"level2_post_norm_block_ids={ids}: with level2_post_norm=True it must name blocks of "
            f"the third stage, 0 to {depths[2] - 1}"
        )
    return tuple(ids)
