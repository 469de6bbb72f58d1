"""What the tasks that a backbone is transferred to have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from m3i_scale.config.data import MAX_PIXELS
from m3i_scale.config.evaluation import Evaluation
from m3i_scale.config.model import Backbone
from m3i_scale.config.schema import Optimizer, RunConfig
from m3i_scale.config.types import BelowOne, Count, Fraction, Node, PathText, Positive


class TransferModel(Node):
    """Networks with a backbone that may start from given weights."""

    backbone: Backbone
    """The image encoder; `drop_path_rate` and `checkpoint_blocks` are among its options."""
    init: PathText | None = None
    """Weights that the backbone starts with, as in pre-training's `model.init`."""


class TransferData(Node):
    """Images on disk, and how they are read."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the pixels, RGB from 0 to 1; subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels; divided by."""
    max_pixels: Count = MAX_PIXELS
    """Larger images cannot be used; they are replaced before they are decoded."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Processes of each rank that load images; 0: the training process loads them."""
    max_bad_rate: Fraction = 0.01
    """Share of images that cannot be used, among the last `bad_window` of a rank, above which a run
    stops.
    """
    bad_window: Count = 10_000
    """Samples over which `max_bad_rate` is measured."""


class TransferOptimizer(Optimizer):
    """AdamW with a learning rate for each layer, and a moving average of the weights."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer of the backbone to the one before it."""
    average: BelowOne | None = None
    """Momentum of a moving average of all weights, which is evaluated in their place; null: none.
    """


class TransferRun(RunConfig):
    """A run that trains a task on images with labels, boxes or masks."""

    model: TransferModel
    """The networks."""
    data: TransferData
    """Images with labels, boxes or masks."""
    optimizer: TransferOptimizer
    """Batch, duration, AdamW, layer decay."""
    evaluation: Evaluation = Evaluation()
    """When to evaluate."""
