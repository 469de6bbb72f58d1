"""Labels of images, and the accuracy of the best answer that ignores the image.

A labelling gives every image a string or None; a task leaves out images without a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from m3i_scale.transfer.features import Known


def subject(caption: str) -> str:
    """What a caption names: the part before its first comma.

    "Greek small letter alpha, serif bold" -> "Greek small letter alpha".
    """
    return caption.split(",", 1)[0].strip()


def subjects(known: Known) -> list[str | None]:
    """The subject of every image's caption."""
    return [subject(caption) if caption else None for caption in known.captions]


def categories(known: Known) -> list[str | None]:
    """The category of every image, as a string."""
    return [str(c) if c >= 0 else None for c in known.category.tolist()]


def rows_with(labels: Sequence[str | None]) -> Tensor:
    """Indices of the images that have a label: int64 (M,)."""
    return torch.tensor([i for i, x in enumerate(labels) if x is not None], dtype=torch.int64)


class Numbering:
    """Distinct labels as numbers 0 .. C-1, in sorted order."""

    def __init__(self, labels: Iterable[str | None]) -> None:
        self.names = sorted({label for label in labels if label is not None})
        self._number = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, labels: Iterable[str | None]) -> Tensor:
        """int64 (N,). Every label must be among the ones counted."""
        return torch.tensor([self._number[x] for x in labels if x is not None], dtype=torch.int64)


def hits(scores: Tensor, truth: Tensor, k: int = 1) -> Tensor:
    """Whether the true column of each row of scores (N, C) is among the k best: bool (N,).

    A tie counts as wrong, so that equal scores for everything are not a success.
    """
    own = scores.gather(1, truth[:, None])  # (N, 1)
    at_least = (scores >= own).sum(1)  # itself among them
    return at_least <= k


def chance(truth: Tensor, k: int = 1) -> float:
    """The best that an answer can do that ignores the image: always the k most frequent labels."""
    return sum(n for _, n in Counter(truth.tolist()).most_common(k)) / len(truth)
