"""Building whole networks on one device from a run's configuration and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from m3i_scale.config import Config
from m3i_scale.objective.m3i import M3I

Which = Literal["student", "teacher"]
ENCODER = "student."  # the part of the networks that has a teacher average


class Weights(Protocol):
    """A checkpoint as `m3i_scale.engine.checkpoint.CheckpointReader` gives it, sharded or not.

    `kind` is "weight" (float32 master weights) or "teacher" (float32 averages of the encoder).
    """

    @property
    def path(self) -> Path:
        """Where it lies, for messages."""
        ...

    @property
    def state(self) -> Mapping[str, Any]:
        """Counters: "step" among them."""
        ...

    @property
    def shapes(self) -> Mapping[str, list[int]]:
        """Shapes of all trained parameters by name."""
        ...

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor in its own shape."""
        ...

    def slice(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened tensor."""
        ...


def build_untrained(config: Config) -> M3I:
    """The networks as a run starts with them, in float32 on the CPU, in evaluation mode.

    The weights are a function of `config.seed`; the caller's random generator is left alone. There
    is no teacher among them: its weights, if wanted, take the place of the student's.

    Raises:
        ValueError: the networks cannot be built.
    """
    return _build(config).eval().requires_grad_(False)


def _build(config: Config) -> M3I:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = M3I(config.model, config.objective, config.data.image_size)
    if hasattr(networks, "teacher"):
        del networks.teacher
    return networks


def build_trained(config: Config, weights: Weights, which: Which = "student") -> M3I:
    """The networks of a checkpoint, in float32 on the CPU, in evaluation mode.

    Args:
        config: of the run that wrote the checkpoint.
        weights: the checkpoint.
        which: "student", or "teacher" for the averages of the image encoder (everything else,
            the text tower say, has no average and is the student's).

    Raises:
        ValueError: the checkpoint is of other networks, or has no averages.
    """
    networks = _build(config)
    # What the objective never reaches is in no checkpoint; it is as the seed made it.
    own = {name: p for name, p in networks.named_parameters() if p.requires_grad}
    shapes = {name: list(parameter.shape) for name, parameter in own.items()}
    _require_equal(shapes, weights, config.objective.frozen_teachers)
    kinds = stored_kinds(shapes, which, has_teacher=config.objective.has_teacher)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights.tensor(kinds[name], name))
    return networks.eval().requires_grad_(False)


def stored_kinds(names: Mapping[str, Any], which: Which, *, has_teacher: bool) -> dict[str, str]:
    """Under which kind the checkpoint holds each parameter of the chosen model.

    Raises:
        ValueError: teacher averages were asked for and the run has none.
    """
    if which == "teacher" and not has_teacher:
        raise ValueError(
            "this run has no teacher, since no target of its objective uses one; take the student"
        )
    averaged = which == "teacher"
    return {
        name: "teacher" if averaged and name.startswith(ENCODER) else "weight" for name in names
    }


def _require_equal(
    shapes: Mapping[str, list[int]], weights: Weights, frozen: Sequence[str]
) -> None:
    """What predicts targets of frozen teachers is of no use without them, and is not built."""
    parts = ("decoders", "linear_decoders")
    left = ("frozen_heads.", *(f"{part}.{name}." for part in parts for name in frozen))
    stored = {name: shape for name, shape in weights.shapes.items() if not name.startswith(left)}
    if stored == shapes:
        return
    differing = sorted(n for n in stored.keys() | shapes.keys() if stored.get(n) != shapes.get(n))
    name = differing[0]
    raise ValueError(
        f"{weights.path} is of other networks: {len(differing)} parameters differ, for instance "
        f"{name} is {stored.get(name, 'absent')} there and {shapes.get(name, 'absent')} by the "
        "configuration; use the config.yaml of the run that wrote it"
    )
