"""What the tasks that a backbone is transferred to have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from m3i_scale.config.schema import Optimizer, RunConfig
from m3i_scale.config.types import BelowOne, Node, Span


class TransferOptimizer(Optimizer):
    """AdamW with a learning rate for each layer, and a moving average of the weights."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer of the backbone to the one before it."""
    average: BelowOne | None = None
    """Momentum of a moving average of all weights, which is evaluated in their place; null: none.
    """


class Evaluation(Node):
    """When the networks are evaluated; at the end of a run they always are."""

    every: Span | None = None
    """Interval of evaluations; null: at the end only."""


class TransferRun(RunConfig):
    """A run that trains a task on images with labels, boxes or masks."""

    optimizer: TransferOptimizer
    """Batch, duration, AdamW, layer decay."""
    evaluation: Evaluation = Evaluation()
    """When to evaluate."""
