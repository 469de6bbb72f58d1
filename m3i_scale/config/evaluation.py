"""Evaluation while training as configuration: when, and for pre-training of what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from m3i_scale.config.types import Count, Node, PathText, Span

# ruff: noqa: RUF012  (pydantic copies defaults)

FeatureTask = Literal["knn", "zero_shot", "retrieval", "classifier", "rank"]


class Evaluation(Node):
    """When the networks are evaluated; at the end of a run they always are."""

    every: Span | None = None
    """Interval of evaluations; null: at the end only."""


class FeatureEvaluation(Evaluation):
    """What the encoder has learned so far, as `m3i eval` measures it, while the run goes on.

    All ranks share the images and stop training meanwhile; a resume is as exact as without. Figures
    go to the metrics as `evaluation/NAME`, accuracies in percent. docs/tasks/evaluate.md says how
    long it takes.
    """

    tasks: list[FeatureTask] = Field(min_length=1)
    """`knn`: nearest neighbours in the gallery; `zero_shot`: the nearest caption; `retrieval`:
    recall at 1, 5 and 10 of the queries' captions by image and of images by caption; `classifier`:
    the category classifier that is pre-trained; `rank`: effective rank of the queries' features.
    """
    queries: list[PathText] = Field(min_length=1)
    """Index files of held-out images."""
    gallery: list[PathText] = []
    """Index files of images with known labels, for `knn`; their captions are candidates of
    `zero_shot`, too.
    """
    weights: Literal["auto", "teacher", "student"] = "auto"
    """Whose image encoder; `auto`: the teacher's, or the student's where the objective has no
    teacher. The text tower and the heads are the student's.
    """
    neighbours: Count = 20
    """That vote in `knn`."""
    limit: Count | None = None
    """Most images of each index, the first ones; null: all."""
    batch: Count = 64
    """Images that a rank encodes at once."""

    @model_validator(mode="after")
    def _of_one_piece(self) -> FeatureEvaluation:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks has a task twice; name each once")
        if "knn" in self.tasks and not self.gallery:
            raise ValueError(
                "the task knn finds neighbours in a gallery; set gallery to index files of images "
                "with known labels, or take knn out of tasks"
            )
        if self.gallery and not {"knn", "zero_shot"} & set(self.tasks):
            raise ValueError(
                "gallery is read for knn and zero_shot, and tasks has neither; remove one of them"
            )
        return self
