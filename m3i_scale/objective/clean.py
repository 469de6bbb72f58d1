"""What trained networks say of whole, clean images and of texts, for evaluation.

Asked through the networks' forward pass, so that an engine that shards them can follow.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from m3i_scale.objective.likelihoods import normalise


class CleanImages(NamedTuple):
    """Images to be encoded as they are: all tokens are seen."""

    images: Tensor  # (B, 3, S, S), normalised, in the networks' dtype
    encoder: Literal["student", "teacher"] = "student"  # the heads are the student's always
    heads: bool = True  # whether the predictions of text and category are wanted


class Texts(NamedTuple):
    """Texts to be embedded."""

    tokens: Tensor  # int64 (B, L)
    mask: Tensor  # bool (B, L)


Asked = CleanImages | Texts


def answer(networks: Any, asked: Asked) -> dict[str, Tensor]:
    """Features of images, or embeddings of texts.

    Args:
        networks: `M3I`.
        asked: which.

    Returns:
        For images "feature" (B, E), what nearest neighbours and linear probes see, and where the
        objective has them "text" (B, T), the prediction of the text, of unit length, and "category"
        (B, C), scores of the classifier. For texts "text" (B, T) of unit length.
    """
    if isinstance(asked, Texts):
        return {"text": normalise(networks.text_tower(asked.tokens, asked.mask), "l2")}
    backbone = (networks.teacher if asked.encoder == "teacher" else networks.student).backbone
    tokens = backbone.features(asked.images)  # (B, N, D)
    pooled = backbone.pool(tokens)  # (B, E)
    # Where all targets are dense nothing trains the pooling: the mean of the tokens is the feature.
    found = {"feature": pooled if networks.objective.pooled else tokens.float().mean(1)}
    if asked.heads and hasattr(networks, "text_tower"):
        found["text"] = networks.predict_text(pooled)
    if asked.heads and hasattr(networks, "category_head"):
        found["category"] = networks.category_head(pooled)
    return found
