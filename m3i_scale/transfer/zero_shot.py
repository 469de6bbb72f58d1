"""Classification by the pre-trained networks, without any further fitting.

Captions (Table 5 of arXiv 2211.09807, "without fine-tuning", image-text data): the
nearest caption classifies an image. Categories (the same column, image-category data): the
classifier's weights are the category embeddings, and the largest product wins.
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_scores(
    images: Tensor, captions: Tensor, caption_label: Tensor, labels: int, chunk: int = 1024
) -> Tensor:
    """Score every label by its nearest caption.

    Args:
        images: (N, T) of unit length.
        captions: (M, T) of unit length, the candidates.
        caption_label: int64 (M,), the label that each candidate stands for.
        labels: C, their number.
        chunk: images at once.

    Returns:
        (N, C): the largest cosine over a label's captions, -inf for a label without captions.
    """
    rows = []
    for part in images.split(chunk):
        cosine = part @ captions.T  # (n, M)
        empty = cosine.new_full((len(part), labels), -torch.inf)
        rows.append(empty.scatter_reduce_(1, caption_label.expand_as(cosine), cosine, "amax"))
    return torch.cat(rows)


def nearest_captions(images: Tensor, captions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices (N, k) of the k captions (M, T) nearest to each image (N, T)."""
    best = (images @ captions.T).topk(min(k, len(captions)), dim=1)
    return best.values, best.indices
