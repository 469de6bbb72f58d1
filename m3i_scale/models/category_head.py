"""The category target of M3I: a linear classifier whose weights are the category embeddings."""

from torch import Tensor, nn

from m3i_scale.models.layers import Linear


class CategoryHead(nn.Module):
    """Scores pooled vectors against one embedding per category.

    The Boltzmann form of arXiv 2211.09807 is exp(zhat . z / tau), a plain scalar product: hence no
    bias by default.
    """

    def __init__(self, embed_dim: int, num_categories: int, *, bias: bool = False) -> None:
        super().__init__()
        if num_categories < 1:
            raise ValueError(f"num_categories={num_categories}: must be at least 1")
        self.classifier = Linear(embed_dim, num_categories, bias=bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map pooled vectors (B, E) to logits (B, num_categories)."""
        return self.classifier(embedding)
