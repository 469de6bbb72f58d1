"""The image decoder of M3I predicts target patches from the visible tokens of the input view."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m3i_scale.models.layers import (
    HEADS,
    init_transformer,
    layer_norm,
    require_divisible,
    run_block,
    trunc_normal_,
)
from m3i_scale.models.positions import position_embedding


class ImageDecoder(nn.Module):
    """Transformer over visible tokens and mask tokens: zhat_y = f_psi(z_x, t_x, t_y).

    Every token carries the embedding of its position in the grid of the input view (see
    `positions`), mapped to the decoder's width by one learned layer: mask tokens that of the
    target patch they stand for, visible tokens their own. The head starts from Glorot's
    distribution (`xavier`), or at `zero`, as the first predictions then are.
    """

    def __init__(
        self,
        in_width: int,
        *,
        out_width: int,
        width: int,
        depth: int,
        heads: int,
        ffn: int,
        head: str,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        require_divisible("decoder width", width, "heads", heads)
        require_divisible("decoder width", width, "the parts of the position embedding", 4)
        self.width = width
        self.checkpoint_blocks = checkpoint_blocks
        self.embed = nn.Linear(in_width, width)
        self.position = nn.Linear(2 * width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        # Block multiplies and truncates: the half keeps `ffn` exact.
        mlp_ratio = (ffn + 0.5) / width
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(depth)
        )
        self.norm = layer_norm(width)
        self.apply(init_transformer)
        self.head = HEADS[head](width, out_width)
        trunc_normal_(self.mask_token)

    def forward(
        self,
        visible: Tensor,
        visible_positions: Tensor,
        target_positions: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Predict M target patches from V visible tokens -> (B, M, out_width).

        visible (B, V, in_width); visible_positions (B, V, 4); target_positions (B, M, 4);
        keep (B, V) bool, False on tokens to be ignored (padding, or the other image of a mix).
        """
        tokens = self.embed(visible) + self._positions(visible_positions, visible.dtype)
        masked = self.mask_token + self._positions(target_positions, visible.dtype)
        x = torch.cat([tokens, masked], 1)  # (B, V + M, width)
        attn_mask = None if keep is None else _key_mask(keep, masked.shape[1])
        for block in self.blocks:
            x = run_block(block, x, attn_mask, checkpointed=self.checkpoint_blocks)
        return self.head(self.norm(x[:, visible.shape[1] :]))

    def _positions(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return self.position(position_embedding(positions, self.width).to(dtype))


def _key_mask(keep: Tensor, targets: int) -> Tensor:
    """Which tokens may be attended to (B, 1, 1, V + M): kept visible ones and all mask tokens."""
    always = keep.new_ones(keep.shape[0], targets)
    return torch.cat([keep, always], 1)[:, None, None]
