"""One data set of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("text", "category", "both")


@dataclass(frozen=True)
class Source:
    """One data set of the mixture.

    Its share of the stream is `weight` where that is given, otherwise samples * `epochs`: with
    the same `epochs` everywhere all sources are shown equally often.
    """

    name: str
    index: str  # path or URL of the Parquet index
    kind: str  # "text", "category" or "both": what every sample of it must have
    weight: float | None = None
    epochs: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"source {self.name!r} has kind {self.kind!r}: it must be in {KINDS}")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"source {self.name!r} has weight {self.weight}: it must be positive")
        if self.epochs <= 0:
            raise ValueError(f"source {self.name!r} has epochs {self.epochs}: it must be positive")
