"""Recall at K between images and their captions, both ways, as on COCO and Flickr30k.

An image may have several captions and a caption several images (equal captions are one). A query
is found at K if any of what belongs to it is among the K best of all candidates; what does not
belong to it and scores the same stands before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3i_scale.transfer.features import Encoded, Known
from m3i_scale.transfer.judge import Score
from m3i_scale.transfer.parts import of_all_ranks, own_part, rows_of_all, sum_of_all

_SCORES = 1 << 24  # scores in memory at once, 64 MiB


class Asked(NamedTuple):
    """Images with captions, and which belong together."""

    images: Mapping[str, Encoded]  # by the networks' names
    rows: list[int]  # of the images that have captions, R of all
    captions: list[str]  # each once, M
    captions_of: list[list[int]]  # of each of `rows`
    images_of: list[list[int]]  # of each caption; numbers in `rows`

    @classmethod
    def of(cls, known: Known, images: Mapping[str, Encoded]) -> Asked:
        """Of the queries of an evaluation.

        Raises:
            ValueError: no image has a caption.
        """
        every = [known.captions_of(image) for image in range(len(known))]
        rows = [image for image, captions in enumerate(every) if captions]
        captions = sorted({caption for own in every for caption in own})
        if not rows:
            raise ValueError(
                "retrieval compares captions, and no query has one; name other indexes"
            )
        number = {caption: i for i, caption in enumerate(captions)}
        captions_of = [[number[caption] for caption in every[image]] for image in rows]
        images_of: list[list[int]] = [[] for _ in captions]
        for place, own in enumerate(captions_of):
            for caption in own:
                images_of[caption].append(place)
        return cls(images, rows, captions, captions_of, images_of)


def scores(
    asked: Asked, embedded: Mapping[str, Tensor], depths: Sequence[int], device: torch.device
) -> Iterator[Score]:
    """Recall at each of `depths`, image to text and text to image (a collective).

    Args:
        asked: what is looked for; images are encoded by parts of the ranks.
        embedded: captions (M, T) of unit length, by the networks' names.
        depths: K.
        device: where the group communicates.
    """
    to_text: dict[str, list[float]] = {}
    to_image: dict[str, list[float]] = {}
    for who, one in asked.images.items():
        assert one.text is not None
        counts = of_all_ranks(len(one.text))
        images = rows_of_all(one.text, counts, device)[asked.rows]
        captions = embedded[who]
        to_text[who] = _recall(images, captions, asked.captions_of, depths, device)
        to_image[who] = _recall(captions, images, asked.images_of, depths, device)
    for words, found, belong, others in (
        ("image to text", to_text, asked.captions_of, len(asked.captions)),
        ("text to image", to_image, asked.images_of, len(asked.rows)),
    ):
        for place, k in enumerate(depths):
            accuracy = {who: values[place] for who, values in found.items()}
            key = f"retrieval_{words.replace(' ', '_')}_{k}"
            title = f"retrieval, {words}, R@{k}"
            yield Score(title, key, accuracy, _chance(belong, k), len(belong), others)


def _recall(
    queries: Tensor,
    candidates: Tensor,
    belong: Sequence[Sequence[int]],
    depths: Sequence[int],
    device: torch.device,
) -> list[float]:
    """Share of the queries that are found at each depth, some by each rank (a collective)."""
    counts, own = torch.zeros(len(depths), dtype=torch.int64), own_part(len(queries))
    step = max(1, _SCORES // len(candidates))
    for first in range(own.start, own.stop, step):
        rows = range(first, min(first + step, own.stop))
        rank = before(
            queries[rows.start : rows.stop] @ candidates.T, belong[rows.start : rows.stop]
        )
        counts += torch.stack([(rank < k).sum() for k in depths])
    return [count / len(queries) for count in sum_of_all(counts, device).tolist()]


def before(scores: Tensor, belong: Sequence[Sequence[int]]) -> Tensor:
    """How many candidates stand before the best that belongs to a query: int64 (n,).

    Args:
        scores: (n, M).
        belong: the candidates of each query, at least one.
    """
    rows = torch.tensor([row for row, own in enumerate(belong) for _ in own])
    columns = torch.tensor([column for own in belong for column in own])
    theirs = torch.zeros_like(scores, dtype=torch.bool)
    theirs[rows, columns] = True
    best = scores.masked_fill(~theirs, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~theirs).sum(1)  # what is no number stands before, too


def _chance(belong: Sequence[Sequence[int]], k: int) -> float:
    """What the K candidates that belong to most queries would find, at most."""
    counts = Counter(candidate for own in belong for candidate in own)
    return min(1.0, sum(count for _, count in counts.most_common(k)) / len(belong))
