"""The forms of P(target given prediction), as configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.types import Node, Positive

LEAST_TEMPERATURE = 0.01  # of those that are learned, as in CLIP


class Gaussian(Node):
    """`||z - z_hat||^2 / (2 sigma^2)`, averaged or summed over the feature dimensions."""

    form: Literal["gaussian"] = "gaussian"
    """Names this likelihood."""
    sigma: Positive = 0.5**0.5
    """Standard deviation; the default makes it the squared error."""
    over_dimensions: Literal["mean", "sum"] = "mean"
    """How feature dimensions are reduced."""


class Boltzmann(Node):
    """`-log softmax(z_hat . z / tau)` over the other targets.

    These are the targets of the micro-batch, or of the batch (`objective.negatives`), on all ranks
    (`candidates: global`) or of the micro-batch on this one (`local`), and the last `queue` keys of
    batches before; with `own`, the queue alone.
    """

    form: Literal["boltzmann"] = "boltzmann"
    """Names this likelihood."""
    temperature: Positive = 0.07
    """tau; its start value if it is learnable."""
    learnable: bool = False
    """Whether the temperature is trained."""
    symmetric: bool = False
    """Also tell predictions apart by targets; the loss is the mean of both."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability spread over all candidates."""
    candidates: Literal["global", "local", "own"] = "global"
    """Targets of the micro-batch on all ranks, of this rank, or the sample's own only."""
    queue: Annotated[int, Field(ge=0)] = 0
    """Number of earlier targets that are negatives, too."""

    @model_validator(mode="after")
    def _possible(self) -> Boltzmann:
        if self.learnable and self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"a learned temperature stays above {LEAST_TEMPERATURE} and cannot start at "
                f"{self.temperature}; set a larger temperature or learnable: false"
            )
        return self


class Sigmoid(Node):
    """`-sum log sigmoid(+-(z_hat . z / tau + b))` over all pairs of predictions and targets.

    Plus where they belong together: every pair is a decision of its own, both directions at once
    (SigLIP, arXiv 2303.15343). Targets are those of the micro-batch, or of the batch
    (`objective.negatives`), on all ranks (`candidates: global`) or of the micro-batch on this one
    (`local`). The defaults are SigLIP's.
    """

    form: Literal["sigmoid"] = "sigmoid"
    """Names this likelihood."""
    temperature: Positive = 0.1
    """tau; its start value if it is learnable. Without a bound."""
    bias: float = -10.0
    """b; its start value if it is learnable. Far below zero: nearly all pairs are negative."""
    learnable: bool = True
    """Whether temperature and bias are trained."""
    candidates: Literal["global", "local"] = "global"
    """Targets of the micro-batch on all ranks, or of this rank."""
