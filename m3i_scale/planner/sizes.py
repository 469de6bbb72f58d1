"""Sizes and flows that the plans of all ZeRO stages are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from m3i_scale.models.precision import DTYPES
from m3i_scale.profiling.record import Weight


class Traffic(NamedTuple):
    """One kind of collective in one optimiser step."""

    name: str
    size: float  # bytes of the full tensors
    sent: float  # bytes that each GPU sends, by ring algorithms
    local: bool  # inside nodes only


class Flow(NamedTuple):
    """What one optimiser step moves between ranks, and what of it lives at once."""

    traffic: list[Traffic]
    collectives: int = 0
    live: int = 0  # most gathered elements at once
    waiting: int = 0  # gathered elements between forward and backward


class Widths(NamedTuple):
    """Bytes per element."""

    compute: int
    master: int  # weights that the optimiser updates, and Adam's moments
    accumulated: int  # gradient shards
    reduced: int  # gradients on the wire

    @classmethod
    def of(cls, precision: str, deepspeed: dict[str, Any]) -> Widths:
        """Of a precision of computation and DeepSpeed's configuration."""
        bf16 = deepspeed.get("bf16", {}).get("bf16_master_weights_and_grads", False)
        return cls(
            DTYPES[precision].itemsize,
            2 if bf16 else 4,
            DTYPES[deepspeed["data_types"]["grad_accum_dtype"]].itemsize,
            DTYPES[deepspeed["communication_data_type"]].itemsize,
        )


def shard(elements: int, ranks: int) -> int:
    """Elements of a parameter that one rank holds, padding included."""
    return -(-elements // ranks)


def averaged_weights(weights: list[Weight]) -> list[Weight]:
    """Parameters of the teacher that follow a trained one."""
    trained = {w.name for w in weights if w.trained}
    return [
        w
        for w in weights
        if w.of_teacher and f"student.{w.name.removeprefix('teacher.')}" in trained
    ]
