"""Every evaluation task for the trained networks, the untrained ones, and chance.

Nearest neighbours and the linear probe learn from the gallery; all figures are accuracies on the
queries. No image of the gallery may be a query. `measure` does the work for any networks, on all
ranks of a run that trains, too; `evaluate` makes the table of `m3i eval`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from m3i_scale.config import Config
from m3i_scale.config.evaluation import FeatureTask
from m3i_scale.data import StorageClient
from m3i_scale.models.tokenizer import Tokenizer, load_tokenizer
from m3i_scale.objective.collapse import SAMPLE, effective_rank
from m3i_scale.transfer import knn, labels, linear_probe, prompts, retrieval, zero_shot
from m3i_scale.transfer.features import (
    Encoded,
    Known,
    Opened,
    Pixels,
    encode_captions,
    encode_sources,
    open_source,
    open_storage,
)
from m3i_scale.transfer.judge import Judge, Score, Scorer, given, of_own_rows

TRAINED, UNTRAINED = "trained", "untrained"
RECALL_AT = (1, 5, 10)  # K of retrieval, unless others are asked for


class Options(NamedTuple):
    """How to evaluate."""

    probe: bool = False  # fit the linear probes, too
    neighbours: int = 20  # of kNN
    batch: int = 64
    limit: int | None = None  # most images of each index
    subject: str = "caption subject"  # what a caption names, in the table
    category: str = "category"  # what a category is, in the table
    tasks: Collection[FeatureTask] = get_args(FeatureTask)
    encoder: Literal["student", "teacher"] = "student"  # of networks that have both
    threads: int = 1  # images decoded at once
    progress: bool = True  # show bars
    recall_at: Sequence[int] = ()  # K of retrieval both ways; none: no retrieval
    prompts: prompts.Prompts | None = None  # names of the categories, in sentences


class TaskScore(NamedTuple):
    """One line of the table; accuracies are shares of the queries."""

    task: str
    trained: float
    untrained: float
    chance: float
    queries: int
    labels: int


class Sets(NamedTuple):
    """What is evaluated on."""

    gallery: list[Opened]
    queries: list[Opened]
    storage: StorageClient


class Measured(NamedTuple):
    """All scores of some networks, and the features that they were made from."""

    scores: list[Score]
    ranks: dict[str, float]  # effective rank of the queries' features, by the networks' names
    gallery: Known
    queries: Known
    gallery_encoded: dict[str, Encoded]  # empty without a gallery
    query_encoded: dict[str, Encoded]
    captions: list[str]  # the candidates of zero-shot; empty where there is none
    embeddings: dict[str, Tensor]  # theirs, (M, T); empty likewise

    @property
    def left_out(self) -> list[str]:
        """Images that cannot be used, and why."""
        return [*self.gallery.left_out, *self.queries.left_out]


class Evaluation(NamedTuple):
    """The table, and the features that the pictures need."""

    rows: list[TaskScore]
    ranks: dict[str, float]  # effective rank of the queries' features
    gallery: Known
    queries: Known
    gallery_features: Tensor  # (N, E) of the trained networks
    query_features: Tensor  # (Q, E)
    query_texts: Tensor | None  # (Q, T); None without a text tower
    captions: list[str]  # the candidates of zero-shot, empty without a text tower
    caption_embeddings: Tensor | None  # (M, T)
    storage: StorageClient  # where the images can be read again
    left_out: list[str]  # images that cannot be used, and why


def evaluate(
    config: Config,
    networks: Mapping[str, nn.Module],
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
    sets = open_sets(config, gallery_paths, query_paths)
    found = measure(config, networks, sets, options)
    rows = [
        TaskScore(s.task, s.accuracy[TRAINED], s.accuracy[UNTRAINED], *s[3:]) for s in found.scores
    ]
    if not rows:
        raise ValueError(
            "gallery and queries have no kind of label in common, neither captions nor categories; "
            "name other indexes"
        )
    return Evaluation(
        rows,
        found.ranks,
        found.gallery,
        found.queries,
        found.gallery_encoded[TRAINED].pooled,
        found.query_encoded[TRAINED].pooled,
        found.query_encoded[TRAINED].text if found.embeddings else None,
        found.captions,
        found.embeddings.get(TRAINED),
        sets.storage,
        found.left_out,
    )


def measure(
    config: Config, networks: Mapping[str, nn.Module], sets: Sets, options: Options
) -> Measured:
    """Encode and judge, on this process alone or, each a part, on all ranks (a collective).

    Args:
        config: of the run; says how images and captions are prepared.
        networks: `M3I`, or on several ranks the engine that drives it, by name.
        sets: from `open_sets`; a gallery may be absent.
        options: see Options.

    Raises:
        UnreadableSetError: no image can be used, or they cannot be read; on all ranks.
        ValueError: a category is outside the classifier; on all ranks.
    """

    def encode(sources: list[Opened], title: str, heads: bool) -> tuple[Known, dict[str, Encoded]]:
        if not sources:
            return Known([], torch.zeros(0, dtype=torch.int64), [], []), {}
        return encode_sources(
            networks,
            sources,
            Pixels.of(config.data),
            batch=options.batch,
            limit=options.limit,
            storage=sets.storage,
            progress=title if options.progress else None,
            encoder=options.encoder,
            heads=heads,
            threads=options.threads,
        )

    gallery, gallery_encoded = encode(sets.gallery, "gallery", False)
    queries, query_encoded = encode(sets.queries, "queries", True)
    candidates = sorted({c for c in (*gallery.captions, *queries.captions) if c})
    one = next(iter(query_encoded.values()))
    has_texts = config.model.text is not None and one.text is not None
    asked = retrieval.Asked.of(queries, query_encoded) if options.recall_at else None
    sentences = {
        "candidates": candidates if has_texts and "zero_shot" in options.tasks else [],
        "captions": asked.captions if asked else [],
        "prompts": options.prompts.sentences if options.prompts else [],
    }
    embedded = _embed(config, networks, sentences, one)
    embeddings = embedded["candidates"]
    device = next(next(iter(networks.values())).parameters()).device
    judge = Judge(query_encoded, device)
    scores = [
        *_zero_shot_scores(judge, queries, query_encoded, candidates, embeddings, options),
        *prompts.scores(
            options.prompts, judge, queries, query_encoded, embedded["prompts"], options.category
        ),
        *(
            retrieval.scores(asked, embedded["captions"], options.recall_at, device)
            if asked
            else ()
        ),
        *_classifier_scores(judge, queries, query_encoded, options),
        *_gallery_scores(judge, gallery, gallery_encoded, queries, query_encoded, options),
    ]
    ranks = {name: _rank(each.pooled) for name, each in query_encoded.items()}
    return Measured(
        scores,
        ranks if "rank" in options.tasks else {},
        gallery,
        queries,
        gallery_encoded,
        query_encoded,
        candidates if embeddings else [],
        embeddings,
    )


def _embed(
    config: Config,
    networks: Mapping[str, nn.Module],
    sentences: Mapping[str, Sequence[str]],
    encoded: Encoded,
) -> dict[str, dict[str, Tensor]]:
    """Sentences of each kind by all networks, float32 (M, T) of unit length on the CPU.

    A collective.

    Raises:
        ValueError: the networks have no text tower.
    """
    embedded: dict[str, dict[str, Tensor]] = {kind: {} for kind in sentences}
    wanted = {kind: found for kind, found in sentences.items() if found}
    if not wanted:
        return embedded
    text = config.model.text
    if text is None or encoded.text is None:
        raise ValueError(
            f"{next(iter(wanted))} are compared by a text tower, which this run did not train; "
            "evaluate a run with a text target"
        )
    tokenizer: Tokenizer = load_tokenizer(text.tokenizer)
    for kind, found in wanted.items():
        for name, model in networks.items():
            embedded[kind][name] = encode_captions(model, tokenizer, found, text.max_length)
    return embedded


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


def open_sets(config: Config, gallery: Sequence[str], queries: Sequence[str]) -> Sets:
    """Open index files.

    Raises:
        ValueError: one cannot be used, or is gallery and queries at once.
    """
    storage = open_storage(config.data)
    both = set(map(os.path.realpath, gallery)) & set(map(os.path.realpath, queries))
    if both:
        raise ValueError(
            f"{both.pop()} is gallery and queries at once, so every query would find itself; "
            "name an index of other images"
        )
    first, second = ([open_source(path, storage) for path in paths] for paths in (gallery, queries))
    return Sets(first, second, storage)


def _rank(features: Tensor) -> float:
    """Effective rank of features (N, E), estimated from samples evenly apart."""
    step = -(-len(features) // SAMPLE)
    return float(effective_rank(features[::step]))


def _zero_shot_scores(
    judge: Judge,
    queries: Known,
    encoded: Mapping[str, Encoded],
    candidates: Sequence[str],
    embeddings: Mapping[str, Tensor],
    options: Options,
) -> Iterator[Score]:
    wanted = labels.rows_with(labels.subjects(queries))
    if not embeddings or not len(wanted):
        return
    kinds: tuple[tuple[Callable[[str], str], str, dict[int, str]], ...] = (
        (labels.subject, options.subject, {1: "zero_shot_top1", 5: "zero_shot_top5"}),
        (str, "whole caption", {1: "zero_shot_caption"}),
    )
    for label_of, name, depths in kinds:
        label_of_each = [label_of(caption) for caption in candidates]
        number = labels.Numbering(label_of_each)
        candidate_label = number(label_of_each)
        truth = number(label_of(queries.captions[i]) for i in wanted.tolist())

        shares = {}
        for who, one in encoded.items():
            scorer = functools.partial(
                zero_shot.label_scores,
                captions=embeddings[who],
                caption_label=candidate_label,
                labels=len(number),
            )
            scores_of = functools.partial(of_own_rows, scorer, given(one.text), one.own)
            shares[who] = judge.shares(scores_of, wanted, truth, list(depths))
        for place, (k, key) in enumerate(depths.items()):
            accuracy = {who: found[place] for who, found in shares.items()}
            title = f"zero-shot {name}, top-{k}"
            chance = labels.chance(truth, k)
            yield Score(title, key, accuracy, chance, len(truth), len(number))


def _classifier_scores(
    judge: Judge, queries: Known, encoded: Mapping[str, Encoded], options: Options
) -> Iterator[Score]:
    wanted = labels.rows_with(labels.categories(queries))
    one = next(iter(encoded.values())).category
    if "classifier" not in options.tasks or one is None or not len(wanted):
        return
    truth, known = queries.category[wanted], one.shape[1]
    if int(truth.max()) >= known:
        raise ValueError(
            f"a query is of category {int(truth.max())} and the pre-trained classifier knows 0 to "
            f"{known - 1}; the queries are numbered otherwise than the training data"
        )

    accuracy = {}
    for who, each in encoded.items():
        scores_of = functools.partial(of_own_rows, _as_they_are, given(each.category), each.own)
        accuracy[who] = judge.shares(scores_of, wanted, truth)[0]
    title = f"pre-trained classifier, {options.category}"
    yield Score(title, "classifier", accuracy, labels.chance(truth), len(truth), known)


def _gallery_scores(
    judge: Judge,
    gallery: Known,
    gallery_encoded: Mapping[str, Encoded],
    queries: Known,
    query_encoded: Mapping[str, Encoded],
    options: Options,
) -> Iterator[Score]:
    """kNN and the linear probe, for every kind of label that both sides carry."""
    methods: list[tuple[str, str, Callable[[Tensor, Tensor, int], Scorer]]] = []
    if "knn" in options.tasks:
        methods.append(("kNN", "knn", functools.partial(_nearest, options.neighbours)))
    if options.probe:
        methods.append(("linear probe", "probe", linear_probe.fit))
    kinds = (
        (labels.subjects, options.subject, "caption"),
        (labels.categories, options.category, "category"),
    )
    for method, short, fit in methods:
        for labelling, name, kind in kinds:
            known, asked = labelling(gallery), labelling(queries)
            have, wanted = labels.rows_with(known), labels.rows_with(asked)
            if not len(have) or not len(wanted):
                continue
            number = labels.Numbering([*known, *asked])
            accuracy = {}
            for who, encoded in query_encoded.items():
                scorer = fit(gallery_encoded[who].pooled[have], number(known), len(number))
                scores_of = functools.partial(_of_rows, scorer, encoded.pooled)
                accuracy[who] = judge.shares(scores_of, wanted, number(asked))[0]
            truth = number(asked)
            key, chance = f"{short}_{kind}", labels.chance(truth)
            yield Score(f"{method} {name}", key, accuracy, chance, len(truth), len(number))


def _nearest(k: int, gallery: Tensor, label: Tensor, count: int) -> Scorer:
    return lambda queries: knn.label_scores(queries, gallery, label, count, k=k)


def _of_rows(scorer: Scorer, values: Tensor, rows: Tensor) -> Tensor:
    return scorer(values[rows])


def _as_they_are(scores: Tensor) -> Tensor:
    return scores
