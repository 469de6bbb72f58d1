"""Small pictures of images, their masks and predictions, kept while a network is tested.

A tile is uint8 (5, S, S): the image, its mask, the prediction, in their proportions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as transforms

from m3i_scale.cluster.launch import World
from m3i_scale.config.segmentation import IGNORED
from m3i_scale.objective.collectives import gather_rows
from m3i_scale.tasks.segmentation.dataset import Sample

SIDE = 256
Tile = tuple[int, float, Tensor]  # number in the set, share of right pixels, picture


@dataclass
class Tiles:
    """Tiles of images that were chosen before, and of those with most wrong pixels."""

    numbers: list[int]
    chosen: list[Tile] = field(default_factory=list)
    worst: list[Tile] = field(default_factory=list)

    @classmethod
    def choose(cls, total: int, number: int) -> Tiles:
        """Choose images at equal distances."""
        number = min(number, total)
        return cls([total * i // number for i in range(number)])

    def add(self, index: int, sample: Sample, prediction: Tensor, confusion: Tensor) -> None:
        """Keep a tested image if it was chosen or is among the worst."""
        most = len(self.numbers)
        labelled = int(confusion.sum())
        right = float(confusion.diagonal().sum()) / labelled if labelled else 1.0
        among = len(self.worst) < most or right < self.worst[-1][1] if most else False
        if index not in self.numbers and not among:
            return
        made = (index, right, tile(sample.image, sample.mask, prediction))
        if index in self.numbers:
            self.chosen.append(made)
        if among:
            self.worst = sorted([*self.worst, made], key=_order)[:most]

    def gathered(self, world: World) -> Tiles:
        """Those of all ranks, on every rank (a collective)."""
        most = len(self.numbers)
        chosen = _exchanged(self.chosen, most, world)
        worst = _exchanged(self.worst, most, world)
        return Tiles(self.numbers, sorted(chosen), sorted(worst, key=_order)[:most])


def tile(image: Tensor, mask: Tensor, prediction: Tensor) -> Tensor:
    """Of image (3, H, W), mask and prediction (H, W), all uint8, the tile."""
    factor = SIDE / max(mask.shape)
    size = [max(round(side * factor), 1) for side in mask.shape]
    made = torch.full((5, SIDE, SIDE), IGNORED, dtype=torch.uint8)
    made[:3, : size[0], : size[1]] = transforms.resize(image, size, antialias=True)
    classes = torch.stack([mask, prediction])[None]
    made[3:, : size[0], : size[1]] = interpolate(classes, size, mode="nearest-exact")[0]
    return made


def _order(tile: Tile) -> tuple[float, int]:
    return tile[1], tile[0]


def _exchanged(tiles: list[Tile], most: int, world: World) -> list[Tile]:
    """The best `most` by `_order` of all ranks; each is broadcast by the rank that has it."""
    if world.size == 1 or not most:
        return tiles
    # float64 holds every number of an image.
    own = torch.full((most, 2), -1.0, dtype=torch.float64, device=world.device)
    for row, (index, right, _) in enumerate(tiles[:most]):
        own[row] = torch.tensor([index, right], dtype=torch.float64)
    found = []
    for rank, rows in enumerate(gather_rows(own.flatten()).view(world.size, most, 2).tolist()):
        found += [
            (right, int(index), rank, place)
            for place, (index, right) in enumerate(rows)
            if index >= 0
        ]
    result = []
    for right, index, rank, place in sorted(found)[:most]:
        picture = torch.empty(5, SIDE, SIDE, dtype=torch.uint8)
        if rank == world.rank:
            picture = tiles[place][2]
        picture = picture.to(world.device)
        dist.broadcast(picture, src=rank)
        result.append((index, right, picture.cpu()))
    return result
