"""What the classes of the configuration are made of: their base, scalar types, the error."""

from __future__ import annotations

import math
import re
import typing
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one sentence for the user.

    `for_users` marks exceptions whose message is all that a user needs: no traceback is shown.
    """

    for_users = True


class Duration(typing.NamedTuple):
    """A length of training, stated once in the unit its author thinks in."""

    amount: float
    unit: str  # "steps", "samples" or "epochs"

    def steps(self, *, batch: int, epoch_samples: int) -> int:
        """Convert to optimiser steps of `batch` samples; an epoch is `epoch_samples` samples."""
        samples = {"steps": batch, "samples": 1, "epochs": epoch_samples}[self.unit]
        return math.ceil(self.amount * samples / batch)

    def __str__(self) -> str:
        return f"{self.amount:.15g} {self.unit}"


def _parse_duration(value: object) -> Duration:
    if isinstance(value, Duration):
        return value
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(step|sample|epoch)s?\s*", str(value))
    if match is None:
        raise ValueError(
            f"{value!r} is not a duration; write '100 steps', '30 epochs', '1e6 samples'"
        )
    return Duration(float(match[1]), match[2] + "s")


Span = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(Duration.__str__)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Node(BaseModel):
    """Base of all configuration classes: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
