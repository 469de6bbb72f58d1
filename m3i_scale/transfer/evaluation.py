"""Every evaluation task for the trained networks, the untrained ones, and chance.

Nearest neighbours and the linear probe learn from the gallery; all figures are accuracies on the
queries. No image of the gallery may be a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from m3i_scale.config import Config, Source
from m3i_scale.data import StorageClient
from m3i_scale.models.tokenizer import Tokenizer, load_tokenizer
from m3i_scale.objective.m3i import M3I
from m3i_scale.transfer import knn, labels, linear_probe, zero_shot
from m3i_scale.transfer.features import (
    Encoded,
    Known,
    Pixels,
    encode_captions,
    encode_sources,
    open_source,
    open_storage,
)

TRAINED, UNTRAINED = "trained", "untrained"


class Options(NamedTuple):
    """How to evaluate."""

    probe: bool = False  # fit the linear probes, too
    neighbours: int = 20  # of kNN
    batch: int = 64
    limit: int | None = None  # most images of each index
    subject: str = "caption subject"  # what a caption names, in the table
    category: str = "category"  # what a category is, in the table


class TaskScore(NamedTuple):
    """One line of the table; accuracies are shares of the queries."""

    task: str
    trained: float
    untrained: float
    chance: float
    queries: int
    labels: int


class Evaluation(NamedTuple):
    """The table, and the features that the pictures need."""

    rows: list[TaskScore]
    gallery: Known
    queries: Known
    gallery_features: Tensor  # (N, E) of the trained networks
    query_features: Tensor  # (Q, E)
    query_texts: Tensor | None  # (Q, T); None without a text tower
    captions: list[str]  # the candidates of zero-shot, empty without a text tower
    caption_embeddings: Tensor | None  # (M, T)
    storage: StorageClient  # where the images can be read again


def evaluate(
    config: Config,
    networks: Mapping[str, M3I],
    gallery_paths: Sequence[str],
    query_paths: Sequence[str],
    options: Options,
) -> Evaluation:
    """Evaluate networks named TRAINED and UNTRAINED, which lie on one device.

    Args:
        config: of the run; says how images and captions are prepared.
        networks: both sets.
        gallery_paths: index files of the images with known labels.
        query_paths: index files of the held-out images.
        options: see Options.

    Raises:
        ValueError: an index cannot be used, is both gallery and queries, there is nothing to
            compare, or a category is outside the classifier.
    """
    storage = open_storage(config.data)
    gallery_sources, query_sources = _open(gallery_paths, query_paths, storage)

    def encode(sources: list[Source], title: str) -> tuple[Known, dict[str, Encoded]]:
        return encode_sources(
            networks,
            sources,
            Pixels.of(config.data),
            batch=options.batch,
            limit=options.limit,
            storage=storage,
            progress=title,
        )

    gallery, gallery_encoded = encode(gallery_sources, "gallery")
    queries, query_encoded = encode(query_sources, "queries")
    candidates = sorted({c for c in (*gallery.captions, *queries.captions) if c})
    embeddings: dict[str, Tensor] = {}
    text = config.model.text
    if candidates and text and query_encoded[TRAINED].text is not None:
        tokenizer: Tokenizer = load_tokenizer(text.tokenizer)
        embeddings = {
            name: encode_captions(model, tokenizer, candidates, text.max_length)
            for name, model in networks.items()
        }
    rows = [
        *_zero_shot_rows(queries, query_encoded, candidates, embeddings, options),
        *_classifier_rows(queries, query_encoded, options),
        *_gallery_rows(gallery, gallery_encoded, queries, query_encoded, options),
    ]
    if not rows:
        raise ValueError(
            "gallery and queries have no kind of label in common, neither captions nor categories; "
            "name other indexes"
        )
    return Evaluation(
        rows,
        gallery,
        queries,
        gallery_encoded[TRAINED].pooled,
        query_encoded[TRAINED].pooled,
        query_encoded[TRAINED].text if embeddings else None,
        candidates if embeddings else [],
        embeddings.get(TRAINED),
        storage,
    )


def markdown(rows: Sequence[TaskScore]) -> str:
    """The table, accuracies in percent."""
    title = "accuracy, %"
    width = max(len(title), *(len(row.task) for row in rows))
    lines = [
        f"| {title:{width}} | trained | untrained | chance | queries | labels |",
        f"| {'-' * width} | ------: | --------: | -----: | ------: | -----: |",
    ]
    lines += [
        f"| {row.task:{width}} | {100 * row.trained:7.1f} | {100 * row.untrained:9.1f} "
        f"| {100 * row.chance:6.1f} | {row.queries:7d} | {row.labels:6d} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _open(
    gallery: Sequence[str], queries: Sequence[str], storage: StorageClient
) -> tuple[list[Source], list[Source]]:
    both = set(map(os.path.realpath, gallery)) & set(map(os.path.realpath, queries))
    if both:
        raise ValueError(
            f"{both.pop()} is gallery and queries at once, so every query would find itself; "
            "name an index of other images"
        )
    first, second = ([open_source(path, storage) for path in paths] for paths in (gallery, queries))
    return first, second


def _row(
    task: str, scores: Mapping[str, Tensor], truth: Tensor, names: int, *, k: int = 1
) -> TaskScore:
    trained, untrained = (labels.accuracy(scores[name], truth, k) for name in (TRAINED, UNTRAINED))
    return TaskScore(task, trained, untrained, labels.chance(truth, k), len(truth), names)


def _zero_shot_rows(
    queries: Known,
    encoded: Mapping[str, Encoded],
    candidates: Sequence[str],
    embeddings: Mapping[str, Tensor],
    options: Options,
) -> Iterator[TaskScore]:
    wanted = labels.rows_with(labels.subjects(queries))
    if not embeddings or not len(wanted):
        return
    kinds = (
        (labels.subject, options.subject, (1, 5)),
        (str, "whole caption", (1,)),
    )
    for label_of, name, depths in kinds:
        label_of_each = [label_of(caption) for caption in candidates]
        number = labels.Numbering(label_of_each)
        truth = number(label_of(queries.captions[i]) for i in wanted.tolist())
        scores = {
            who: zero_shot.label_scores(
                _given(encoded[who].text)[wanted], captions, number(label_of_each), len(number)
            )
            for who, captions in embeddings.items()
        }
        for k in depths:
            yield _row(f"zero-shot {name}, top-{k}", scores, truth, len(number), k=k)


def _classifier_rows(
    queries: Known, encoded: Mapping[str, Encoded], options: Options
) -> Iterator[TaskScore]:
    wanted = labels.rows_with(labels.categories(queries))
    if encoded[TRAINED].category is None or not len(wanted):
        return
    scores = {who: _given(e.category)[wanted] for who, e in encoded.items()}
    truth = queries.category[wanted]
    known = scores[TRAINED].shape[1]
    if int(truth.max()) >= known:
        raise ValueError(
            f"a query is of category {int(truth.max())} and the pre-trained classifier knows 0 to "
            f"{known - 1}; the queries are numbered otherwise than the training data"
        )
    yield _row(f"pre-trained classifier, {options.category}", scores, truth, known)


def _gallery_rows(
    gallery: Known,
    gallery_encoded: Mapping[str, Encoded],
    queries: Known,
    query_encoded: Mapping[str, Encoded],
    options: Options,
) -> Iterator[TaskScore]:
    """kNN and the linear probe, for every kind of label that both sides carry."""

    def nearest(q: Tensor, g: Tensor, label: Tensor, names: int) -> Tensor:
        return knn.label_scores(q, g, label, names, k=options.neighbours)

    methods: list[tuple[str, Callable[..., Tensor]]] = [("kNN", nearest)]
    methods += [("linear probe", linear_probe.label_scores)] if options.probe else []
    kinds = ((labels.subjects, options.subject), (labels.categories, options.category))
    for method, scores_of in methods:
        for labelling, name in kinds:
            known, asked = labelling(gallery), labelling(queries)
            have, wanted = labels.rows_with(known), labels.rows_with(asked)
            if not len(have) or not len(wanted):
                continue
            number = labels.Numbering([*known, *asked])
            scores = {
                who: scores_of(
                    query_encoded[who].pooled[wanted],
                    gallery_encoded[who].pooled[have],
                    number(known),
                    len(number),
                )
                for who in query_encoded
            }
            yield _row(f"{method} {name}", scores, number(asked), len(number))


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # these networks were seen to have it
    return value
