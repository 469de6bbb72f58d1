"""Attention pooling maps the tokens of an image to one vector.

InternImage's published H and G models pool with one cross-attention whose query is the mean token
(arXiv 2211.05778; the names below are those of their checkpoints). M3I adds one thing: in a mix of
two images each image is pooled from its own tokens only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.models.layers import XavierLinear, layer_norm, require_divisible


class CrossAttention(nn.Module):
    """Multi-head attention from a few queries to many keys, biases held apart from the weights."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        require_divisible("width", width, "heads", heads)
        self.heads = heads
        self.q_bias = nn.Parameter(torch.empty(width))
        self.k_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()
        self.q = XavierLinear(width, width, bias=False)
        self.k = XavierLinear(width, width, bias=False)
        self.v = XavierLinear(width, width, bias=False)
        self.proj = XavierLinear(width, out_width)

    def reset_parameters(self) -> None:
        """Set the biases to zero; the layers inside reset their own weights."""
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            nn.init.zeros_(bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend from q (B, Q, D) to k, v (B, N, D) where keep (B, N) is True -> (B, Q, E)."""
        q = self._split_heads(self.q(q) + self.q_bias)
        k = self._split_heads(self.k(k) + self.k_bias)
        v = self._split_heads(self.v(v) + self.v_bias)
        mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, N)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, Q, D / heads)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)


class AttentionPool(nn.Module):
    """Pools tokens (B, N, D) to (B, E) by attention from their mean.

    `keep` (B, N) bool restricts both the mean and the attention to the tokens of one image. Each
    row must keep at least one token; a row that keeps none gives NaN.
    """

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.norm1_q = nn.Sequential(layer_norm(width))
        self.norm1_k = nn.Sequential(layer_norm(width))
        self.norm1_v = nn.Sequential(layer_norm(width))
        self.cross_dcn = CrossAttention(width, heads, out_width)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D), all or those where keep (B, N) is True, to (B, E)."""
        if keep is not None and (keep.dtype != torch.bool or keep.shape != tokens.shape[:2]):
            raise ValueError(
                f"keep is {keep.dtype} {tuple(keep.shape)}: must be bool {tuple(tokens.shape[:2])}"
            )
        query = masked_mean(tokens, keep)[:, None]  # (B, 1, D)
        pooled = self.cross_dcn(
            self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens), keep
        )
        return pooled[:, 0]


def masked_mean(tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the tokens of (B, N, D) where keep (B, N) is True (None: all) -> (B, D)."""
    if keep is None:
        return tokens.mean(1)
    # `where`, not a product: a dropped token that is not finite must not reach the mean.
    kept = torch.where(
        keep[..., None], tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device)
    )
    return kept.sum(1) / keep.sum(1, keepdim=True).to(tokens.dtype)
