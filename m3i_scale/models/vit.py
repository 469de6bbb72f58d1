"""Vision Transformer from timm's layers, as a `Backbone`.

Layer names are timm's (`patch_embed`, `blocks`, `norm`). There is no class token, and positions
are fixed 2-D sine-cosine embeddings, as in MAE and SiameseIM, computed for the grid at hand: no
parameter, and any image size that the patch divides.
"""

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
    ) -> None:
        super().__init__()
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
        grid = self.grid_size(*images.shape[-2:])
        x = self.patch_embed(images)  # (B, N, D)
        x = x + grid_embedding(grid, self.width, x.device).to(x.dtype)
        drawn = None
        if self.training and self.drop_path_rate:
            drawn = draw_uniform(len(x), 2 * len(self.blocks), keys, x.device)
        for n, block in enumerate(self.blocks):
            own = None if drawn is None else drawn[2 * n : 2 * n + 2]
            x = run_block(block, x, own, checkpointed=self.checkpoint_blocks)
        return self.norm(x)

    def pool(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D), all or those where keep (B, N) is True, to (B, E)."""
        return self.attention_pool(tokens, keep)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the pooled vector (B, E)."""
        return self.pool(self.features(images))
