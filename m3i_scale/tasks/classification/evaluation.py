"""Accuracy of a classifier over a whole set, on any number of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_scale.cluster.launch import World
from m3i_scale.data.map_stream import MapDataset, shares


class Tested(NamedTuple):
    """What a classifier answered.

    confusion  int64 (C, C) on the CPU: rows are true classes
    top5       share of the images whose class is among the five largest scores
    left_out   images that cannot be used
    """

    confusion: Tensor
    top5: float
    left_out: int


def confusion(
    networks: Any,
    dataset: MapDataset,
    classes: int,
    world: World,
    *,
    batch: int,
    dtype: torch.dtype,
    workers: int = 0,
) -> Tested:
    """Count predictions, and how often the truth is among the first five (a collective).

    Args:
        networks: as `ClassificationNetworks`, in evaluation mode.
        dataset: `LabelledBatch` by `collate`.
        classes: C.
        world: this rank.
        batch: images at once, on each rank.
        dtype: of the networks' input.
        workers: processes that load images.

    Raises:
        ValueError: no image can be used.
    """
    counts = torch.zeros(classes * classes + 2, dtype=torch.int64, device=world.device)
    each = shares(dataset, batch, rank=world.rank, world_size=world.size, workers=workers)
    for share in each:
        real = torch.tensor([index >= 0 for index in share.indices], device=world.device)
        data = share.batch.to(world.device)
        scores = networks(data.images.to(dtype))["scores"].float()
        best = scores.topk(min(5, classes), dim=1).indices
        truth, predicted = data.labels[real], best[real, 0]
        counts[:-2] += torch.bincount(truth * classes + predicted, minlength=classes * classes)
        counts[-2] += (best[real] == truth[:, None]).any(1).sum()
        counts[-1] += len(share.bad)
    if world.size > 1:
        dist.all_reduce(counts)
    counts = counts.cpu()
    matrix = counts[:-2].view(classes, classes)
    return Tested(matrix, int(counts[-2]) / max(1, int(matrix.sum())), int(counts[-1]))
