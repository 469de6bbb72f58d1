"""Weighted k-nearest-neighbour classification on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def neighbours(
    queries: Tensor, gallery: Tensor, k: int, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cosines and indices (Q, k) of the gallery's features (N, E) nearest to the queries (Q, E)."""
    gallery = F.normalize(gallery, dim=1)
    found = [
        (F.normalize(part, dim=1) @ gallery.T).topk(min(k, len(gallery)), dim=1)
        for part in queries.split(chunk)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def label_scores(
    queries: Tensor,
    gallery: Tensor,
    gallery_label: Tensor,
    labels: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Votes of the k nearest neighbours, each with weight `exp(cosine / temperature)`.

    Args:
        queries: (Q, E).
        gallery: (N, E).
        gallery_label: int64 (N,).
        labels: C, their number.
        k: neighbours that vote (at most N).
        temperature: of the weights; k and temperature are those of Wu et al., arXiv 1805.01978,
            as used for self-supervised models since.

    Returns:
        (Q, C): weight of each label; a label without a vote has 0.
    """
    cosine, index = neighbours(queries, gallery, k)
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
    votes = torch.zeros(len(queries), labels)
    return votes.scatter_add_(1, gallery_label[index], weight)
