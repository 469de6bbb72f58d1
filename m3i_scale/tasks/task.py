"""A task that knows its samples, as an entry point starts it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from m3i_scale.engine.task import Stream, Task


class SampleStream(Stream, Protocol):
    """A stream of samples that can say what it is."""

    @property
    def samples(self) -> int:
        """Samples of one pass over everything: an epoch."""
        ...

    def identities(self) -> Sequence[Mapping[str, Any]]:
        """What each source is, whatever its path, as JSON."""
        ...

    def describe(self) -> dict[str, dict[str, int | float | str]]:
        """Facts about each source, for `--dry-run`."""
        ...


class SampledTask(Task):
    """A task that opens the stream of its samples."""

    @abstractmethod
    def open_stream(self) -> SampleStream:
        """The samples of training.

        Raises:
            ConfigError: a file is missing or does not fit.
        """
