"""What the classes of the configuration are made of: their base, scalar types, the error."""

from __future__ import annotations

import math
import re
import typing
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
)

from m3i_scale import paths


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
    match = re.fullmatch(
        r"\s*([0-9._]+(?:[eE][-+]?[0-9]+)?)\s*(step|sample|epoch)s?\s*", str(value)
    )
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if match is None or math.isnan(amount):
        raise ValueError(
            f"{value!r} is not a duration; write '100 steps', '30 epochs', '1e6 samples'"
        )
    if amount > LONGEST:
        raise ValueError(f"{value!r} is longer than {LONGEST:g} {match[2]}s; write a shorter one")
    return Duration(amount, match[2] + "s")


def _more_than_none(value: Duration) -> Duration:
    if value.amount == 0:
        raise ValueError(
            f"'{value}' is no length of time; write more, and for 'never' null where that is "
            "possible, else a length beyond the end of the run"
        )
    return value


def _run_name(value: str) -> str:
    parts = value.split("/")
    if not all(parts) or {".", ".."} & set(parts) or re.search(r"^~|\$|[\0\r\n]", value):
        raise ValueError(
            f"{value!r} cannot name a run; it becomes a folder below `folder`, which is where a "
            "path, ~ or a $VARIABLE can stand"
        )
    return value


def _momentum(value: object) -> float | str:
    if value == "by_length":
        return "by_length"
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is no momentum; write a number from 0 to 1, or by_length")
    return number


LONGEST = 1e15  # of a duration, in any unit: beyond it floats skip whole numbers
_Durations = Annotated[
    Duration, BeforeValidator(_parse_duration), PlainSerializer(Duration.__str__)
]
SpanOrZero = _Durations
Span = Annotated[_Durations, AfterValidator(_more_than_none)]
# Expanded once, when it is read; YAML gives back the same path, whatever is in it.
PathText = Annotated[
    str, AfterValidator(paths.expand), PlainSerializer(paths.literal, when_used="json")
]
RunName = Annotated[str, AfterValidator(_run_name)]
Momentum = Annotated[float | Literal["by_length"], BeforeValidator(_momentum)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Node(BaseModel):
    """Base of all configuration classes: immutable, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
