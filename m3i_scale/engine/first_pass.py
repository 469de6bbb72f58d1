"""The pass without gradient over a step's micro-batches, where samples are compared across them."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


class FirstPass:
    """ZeRO-3's record of the order of modules in passes without gradient.

    DeepSpeed (0.19) records the order once, gathers ahead by it, and begins to record again, with
    nothing gathered ahead, where a pass takes another way. These passes have a record for
    themselves, so that neither kind disturbs the other.
    """

    def __init__(self, zero_optimizer: Any) -> None:
        self._offload: Any = getattr(zero_optimizer, "parameter_offload", None)
        self._own: Any = None
        theirs = getattr(self._offload, "param_coordinator", None)
        if hasattr(theirs, "_clear_trace_structures"):
            self._own = copy.copy(theirs)
            self._own._clear_trace_structures()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, forward passes of the engine are first passes."""
        if self._own is None:
            log.warning(
                "this DeepSpeed has no parameter coordinator that could be copied: with "
                "objective.negatives: batch it gathers no weights ahead, and steps are slower"
            )
            yield
            return
        theirs, self._offload.param_coordinator = self._offload.param_coordinator, self._own
        try:
            yield
        finally:
            self._offload.param_coordinator = theirs
