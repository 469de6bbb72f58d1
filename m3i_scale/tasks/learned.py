"""What an encoder has learned so far, measured by `m3i_scale.transfer` while it is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config, ConfigError
from m3i_scale.engine.task import Values
from m3i_scale.transfer.evaluation import RECALL_AT, TRAINED, Options, measure, open_sets
from m3i_scale.transfer.features import Opened, UnreadableSetError

log = logging.getLogger(__name__)


class Learned:
    """The evaluation of a run's encoder at intervals.

    Args:
        config: with `evaluation`.

    Raises:
        ConfigError: an index cannot be used, or has not the labels that a task needs.
    """

    def __init__(self, config: Config) -> None:
        assert config.evaluation is not None
        self._config, self._spec = config, config.evaluation
        try:
            self._sets = open_sets(config, self._spec.gallery, self._spec.queries)
        except (ValueError, PermissionError, FileNotFoundError, IsADirectoryError) as error:
            raise ConfigError(f"evaluation: {error}") from error
        self._require_labels()
        self._named: set[str] = set()  # samples left out that the log has named

    def require(self, ranks: int) -> None:
        """Refuse sets that are smaller than the number of ranks, which share them.

        Raises:
            ConfigError: one is.
        """
        for name, sources in (("queries", self._sets.queries), ("gallery", self._sets.gallery)):
            images = self._images(sources)
            if sources and images < ranks:
                raise ConfigError(
                    f"evaluation.{name} has {images} images for {ranks} ranks, which share them; "
                    f"name larger indexes, raise evaluation.limit, or start fewer ranks"
                )

    def describe(self) -> str:
        """In a few words, for `--dry-run`."""
        sets = self._sets
        every = f"every {self._spec.every} and at the end" if self._spec.every else "at the end"
        gallery = f", gallery {self._images(sets.gallery):,}" if sets.gallery else ""
        return (
            f"evaluation {every}: {', '.join(self._spec.tasks)} of the "
            f"{self._config.evaluated_encoder}; queries {self._images(sets.queries):,}{gallery}"
        )

    def figures(self, networks: Any, world: World) -> Values:
        """Accuracies in percent, effective rank, number of images left out (a collective).

        Args:
            networks: the engine that drives them, in evaluation mode.
            world: this rank.
        """
        spec, config = self._spec, self._config
        options = Options(
            neighbours=spec.neighbours,
            batch=spec.batch,
            limit=spec.limit,
            tasks=spec.tasks,
            encoder=config.evaluated_encoder,
            threads=max(1, config.data.workers),
            progress=False,
            recall_at=RECALL_AT if "retrieval" in spec.tasks else (),
        )
        try:
            found = measure(config, {TRAINED: networks}, self._sets, options)
        except UnreadableSetError as error:  # the run goes on without
            if world.is_main:
                log.warning("this evaluation is left out: %s", error)
            both = (*self._sets.gallery, *self._sets.queries)
            return {"left_out": float(self._images(both))}
        if world.is_main:
            self._name(found.left_out)
        values = {score.key: 100 * score.accuracy[TRAINED] for score in found.scores}
        ranks = {"rank": found.ranks[TRAINED]} if found.ranks else {}
        return values | ranks | {"left_out": float(len(found.left_out))}

    def _name(self, left_out: Sequence[str]) -> None:
        for sample in left_out:
            if sample not in self._named:
                log.warning("evaluation: left out %s", sample)
        self._named.update(left_out)

    def _images(self, sources: Sequence[Opened]) -> int:
        limit = self._spec.limit
        counts = (one.index.samples for one in sources)
        return sum(count if limit is None else min(limit, count) for count in counts)

    def _require_labels(self) -> None:
        """Refuse tasks whose labels no index has."""
        tasks = self._spec.tasks
        asked, known = _labels(self._sets.queries), _labels(self._sets.gallery)
        if "knn" in tasks and not asked & known:
            raise ConfigError(
                f"evaluation: knn needs labels that both sides have, and evaluation.queries has "
                f"{_listed(asked)}, evaluation.gallery {_listed(known)}; name other indexes, or "
                "take knn out of evaluation.tasks"
            )
        for task, kind in (
            ("zero_shot", "captions"), ("retrieval", "captions"), ("classifier", "categories"),
        ):  # fmt: skip
            if task in tasks and kind not in asked:
                raise ConfigError(
                    f"evaluation: {task} is judged by {kind}, and evaluation.queries has "
                    f"{_listed(asked)} only; name indexes with {kind}, or take {task} out of "
                    "evaluation.tasks"
                )
        categories = self._config.model.categories
        for one in self._sets.queries if "classifier" in tasks else ():
            largest = one.index.largest_category
            if one.source.has_category and largest is not None and largest >= categories:
                raise ConfigError(
                    f"evaluation: {one.source.index} has category {largest}, and "
                    f"model.categories is {categories}; its images are numbered otherwise than the "
                    "training data"
                )


def _labels(sources: Sequence[Opened]) -> set[str]:
    found = set()
    for source in (one.source for one in sources):
        found |= {"captions"} if source.has_text else set()
        found |= {"categories"} if source.has_category else set()
    return found


def _listed(labels: set[str]) -> str:
    return " and ".join(sorted(labels)) or "no labels"
