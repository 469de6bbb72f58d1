"""Errors that the hardware makes without a word: who made them, and how the run ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from m3i_scale.cluster.launch import World, gather_objects

CORRUPTED = 89  # exit code


class Place(NamedTuple):
    """Where a rank runs."""

    node: str  # as the scheduler names it
    device: str

    def __str__(self) -> str:
        return f"{self.node}, {self.device}"


class CorruptionError(RuntimeError):
    """A device, its memory or the network has given a wrong result.

    Args:
        words: what happened, a sentence.
        nodes: that are to blame, as the scheduler names them; none if no single one is.
    """

    for_users = True
    cause = "corrupted"  # in the run's events
    exit_code = CORRUPTED

    def __init__(self, words: str, nodes: Iterable[str] = ()) -> None:
        super().__init__(words)
        self.nodes = sorted(set(nodes))


def places(world: World) -> list[Place]:
    """Of all ranks (a collective)."""
    own = Place(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), _device(world.device))
    return gather_objects(own, world)


def listed(found: Mapping[int, str], where: Sequence[Place]) -> str:
    """What is wrong on which ranks, the first four of them in full."""
    said = "; ".join(f"rank {r} ({where[r]}): {words}" for r, words in list(found.items())[:4])
    return said + (f"; and {len(found) - 4} ranks more" if len(found) > 4 else "")


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    known = torch.cuda.get_device_properties(device)
    return f"{device} ({known.name}, {getattr(known, 'uuid', 'no UUID')})"
