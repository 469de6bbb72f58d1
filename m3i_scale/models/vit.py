"""Vision Transformer from timm's layers, as a `Backbone`.

Layer names are timm's (`patch_embed`, `blocks`, `norm`). There is no class token, and positions
are fixed 2-D sine-cosine embeddings, as in MAE and SiameseIM, computed for the grid at hand: no
parameter, and any image size that the patch divides. `position_grid` says how many rows and columns
the network was trained on (14 at 224 pixels): at other sizes positions are then those coordinates
in finer or coarser steps, as MAE and ViTDet interpolate them, and not indices beyond all that the
network has seen.
"""

from collections.abc import Iterator, Sequence

from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block as PlainBlock
from torch import Tensor, nn

from m3i_scale.models.layers import (
    init_transformer,
    layer_norm,
    require_divisible,
    run_block,
)
from m3i_scale.models.pooling import AttentionPool
from m3i_scale.models.positions import grid_embedding
from m3i_scale.models.stochastic_depth import DropPath, draw_uniform, drop_path_rates


class Block(PlainBlock):
    """timm's block, whose stochastic depth is drawn by its caller."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(width, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Apply to x (B, N, D); `drawn` (2, B): see `DropPath`."""
        attention, mlp = (None, None) if drawn is None else drawn
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))), attention)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))), mlp)


class ViT(nn.Module):
    """ViT of any size; the defaults are ViT-B/16 with the pooling of arXiv 2211.09807, Table 7."""

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        pool_heads: int = 16,
        embed_dim: int = 768,
        drop_path_rate: float = 0.0,
        drop_path_type: str = "linear",
        checkpoint_blocks: bool = False,
        position_grid: int | None = None,
    ) -> None:
        super().__init__()
        if position_grid is not None and position_grid < 1:
            raise ValueError(f"position_grid={position_grid}: must be 1 or more, or null")
        self.position_grid = position_grid
        require_divisible("width", width, "heads", heads)
        require_divisible("width", width, "the parts of the position embedding", 4)
        self.width, self.embed_dim, self.stride = width, embed_dim, patch_size
        self.checkpoint_blocks = checkpoint_blocks
        self.patch_embed = PatchEmbed(None, patch_size, embed_dim=width, strict_img_size=False)
        rates = drop_path_rates(drop_path_rate, depth, drop_path_type)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, drop_path=rate) for rate in rates
        )
        self.drop_path_rate = drop_path_rate
        self.norm = layer_norm(width)
        self.attention_pool = AttentionPool(width, pool_heads, embed_dim)
        self.apply(init_transformer)

    @property
    def pooling(self) -> nn.Module:
        """What `pool` adds to the features."""
        return self.attention_pool

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches of an image of height x width pixels."""
        for name, value in (("height", height), ("width", width)):
            require_divisible(f"image {name}", value, "patch size", self.stride)
        return height // self.stride, width // self.stride

    def features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to tokens (B, N, D), row-major, after the last norm.

        `keys` (B,): see `Backbone`.
        """
        return self.features_after(images, [len(self.blocks) - 1], keys)[0]

    def features_after(
        self, images: Tensor, blocks: Sequence[int], keys: Tensor | None = None
    ) -> list[Tensor]:
        """Map images (B, 3, H, W) to the tokens (B, N, D) after each of these blocks, from 0 on.

        Those of the last block are normalised, as `features` gives them; the others are not.

        Raises:
            ValueError: there is no such block, or the image size does not fit.
        """
        if not all(0 <= n < len(self.blocks) for n in blocks):
            raise ValueError(f"blocks {list(blocks)}: this ViT has 0 to {len(self.blocks) - 1}")
        after: dict[int, Tensor] = {}
        for n, x in enumerate(self.after_each_block(self.embed(images), keys)):
            if n in blocks:
                after[n] = x
        after[len(self.blocks) - 1] = self.norm(x)
        return [after[n] for n in blocks]

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to patches with their positions (B, N, D), row-major."""
        grid = self.grid_size(*images.shape[-2:])
        x = self.patch_embed(images)
        positions = grid_embedding(grid, self.width, x.device, self.position_grid)
        return x + positions.to(x.dtype)

    def after_each_block(self, x: Tensor, keys: Tensor | None) -> Iterator[Tensor]:
        """Run the blocks on `embed`'s tokens; `keys` (B,): see `Backbone`."""
        drawn = None
        if self.training and self.drop_path_rate:
            drawn = draw_uniform(len(x), 2 * len(self.blocks), keys, x.device)
        for n, block in enumerate(self.blocks):
            own = None if drawn is None else drawn[2 * n : 2 * n + 2]
            x = run_block(block, x, own, checkpointed=self.checkpoint_blocks)
            yield x

    def pool(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D), all or those where keep (B, N) is True, to (B, E)."""
        return self.attention_pool(tokens, keep)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the pooled vector (B, E)."""
        return self.pool(self.features(images))
