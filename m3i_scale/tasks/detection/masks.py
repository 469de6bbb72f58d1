"""Masks of regions and masks of images, between which nothing may shift.

The value of a pixel is that of its centre, half a pixel from its edges, in both directions.
torchvision's `project_masks_on_boxes` and `paste_masks_in_image` take it at the corner, and the
box for a pixel larger than it is: a mask that goes through both comes back moved and stretched,
which costs small and thin objects most of their overlap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align


def cut_masks(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """Masks (G, H, W) inside boxes (N, 4): float32 (N, side, side), the share of each cell.

    Args:
        masks: of the objects of an image.
        boxes: left, top, right, bottom in pixels.
        matched: int64 (N,), the object of each box.
        side: of the regions.
    """
    regions = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].to(boxes), regions, (side, side), 1.0, aligned=True)[:, 0]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities (N, side, side) inside boxes (N, 4) -> bool (N, H, W), where they exceed 0.5.

    The opposite of `cut_masks`: each pixel's centre is looked up, bilinearly.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, (left, top, right, bottom), out in zip(masks, boxes.tolist(), pasted, strict=True):
        columns, rows = _centres(left, right, width), _centres(top, bottom, height)
        if not len(columns) or not len(rows):
            continue
        y = (rows + 0.5 - top) / (bottom - top) * 2 - 1
        x = (columns + 0.5 - left) / (right - left) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).to(mask)
        found = F.grid_sample(
            mask[None, None], grid[None], padding_mode="border", align_corners=False
        )[0, 0]
        out[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = found > 0.5
    return pasted


def _centres(low: float, high: float, limit: int) -> Tensor:
    """Pixels whose centres lie between two edges, of `limit`: float64 (n,)."""
    first, last = max(math.ceil(low - 0.5), 0), min(math.floor(high - 0.5), limit - 1)
    return torch.arange(first, last + 1, dtype=torch.float64)
