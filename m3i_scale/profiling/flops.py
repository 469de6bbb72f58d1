"""Floating-point operations of training, counted by running the networks without data.

Convention: one multiply-add is 2 FLOPs; a backward pass is twice its forward pass. The count
includes matrix products, attention, convolutions and DCNv3. It leaves out element-wise work, norms,
softmax, the optimiser, and the product of predictions with the targets of other ranks. Texts count
at their full length. DCNv3 counts as its authors count it: 5 multiply-adds per position, sampling
point and channel (four for the bilinear reading, one for the weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from m3i_scale.config import Config, Model, Objective
from m3i_scale.models.frozen import FrozenEncoder
from m3i_scale.profiling.record import Trace
from m3i_scale.profiling.trace import trace


class PartFlops(NamedTuple):
    """FLOPs per sample of one part of a training step."""

    forward: float
    backward: float  # 0 where nothing is trained
    recomputed: float  # forward passes repeated by activation checkpointing


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample of one optimiser step, by part.

    Parts: "backbone" (the student on the input, and on clean views where those are its
    targets), "teacher" and "frozen teachers" (on all clean views), "decoder" (once per dense
    target), "text tower", "heads" (pooling, projections, classifier). Only those that the
    objective has.
    """

    parts: dict[str, PartFlops]

    @property
    def forward(self) -> float:
        """One forward pass of everything."""
        return sum(part.forward for part in self.parts.values())

    @property
    def model(self) -> float:
        """The FLOPs of model FLOPs utilisation: those of the method, without recomputation."""
        return self.forward + sum(part.backward for part in self.parts.values())

    @property
    def hardware(self) -> float:
        """What is computed, with the recomputation of activation checkpointing."""
        return self.model + sum(part.recomputed for part in self.parts.values())


def step_flops(
    model: Model,
    objective: Objective,
    image_size: int,
    frozen: Mapping[str, FrozenEncoder] | None = None,
) -> Flops:
    """Count the FLOPs that one sample costs in one optimiser step.

    Arguments as of `trace`; the number depends neither on precision nor on kernels.

    May be called anywhere, also beside a running training: it uses no process group, and neither
    memory nor random generators of a device.

    Raises:
        ValueError: the networks cannot be built.
    """
    return flops_of(trace(model, objective, image_size, frozen, precision="bf16", kernels=False))


def run_flops(
    config: Config, frozen: Mapping[str, FrozenEncoder] | None = None
) -> dict[int, Flops]:
    """`step_flops` of a run's steps by the side of their views (`data.mixed_sizes`).

    Arguments and errors as of `step_flops`.
    """
    return {
        size: step_flops(config.model, config.objective, size, frozen) for size in config.data.sizes
    }


def mean_flops(shares: Iterable[float], flops: Iterable[Flops]) -> Flops:
    """The mean over steps of several kinds, of which each has a share."""
    parts: dict[str, PartFlops] = {}
    for share, one in zip(shares, flops, strict=True):
        for name, part in one.parts.items():
            before = parts.get(name, PartFlops(0.0, 0.0, 0.0))
            sums = (a + share * b for a, b in zip(before, part, strict=True))
            parts[name] = PartFlops(*sums)
    return Flops(parts)


def flops_of(traced: Trace) -> Flops:
    """The FLOPs that a trace has counted."""
    return Flops(
        {
            part: PartFlops(forward, traced.backward[part], traced.recomputed[part])
            for part, forward in traced.forward.items()
            if forward
        }
    )
