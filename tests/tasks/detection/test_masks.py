"""Masks of regions and of images: nothing moves between them."""

from __future__ import annotations

import pytest
import torch

from m3i_scale.tasks.detection.masks import cut_masks, paste_masks


@pytest.mark.parametrize("side", [28, 56])
def test_a_mask_survives_its_region(side):
    # A letter H of strokes of two pixels, in the smallest box around it.
    mask = torch.zeros(1, 48, 40, dtype=torch.uint8)
    mask[0, 10:34, 7:9] = mask[0, 10:34, 23:25] = mask[0, 21:23, 7:25] = 1
    box = torch.tensor([[7.0, 10.0, 25.0, 34.0]])
    region = cut_masks(mask, box, torch.tensor([0]), side)
    assert torch.equal(paste_masks(region, box, (48, 40))[0], mask[0].bool())


def test_a_region_of_pixels_is_the_pixels():
    mask = (torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).byte()
    boxes = torch.tensor([[3.0, 4.0, 11.0, 12.0], [-2.0, 14.0, 6.0, 22.0]])
    regions = cut_masks(mask, boxes[:1], torch.tensor([1]), 8)
    assert torch.equal(regions[0], mask[1, 4:12, 3:11].float())
    # A box beyond the image: what lies inside is pasted, and an empty one is nothing.
    ones = torch.ones(3, 8, 8)
    pasted = paste_masks(ones, torch.cat([boxes, torch.tensor([[5.0, 5.0, 5.0, 9.0]])]), (20, 20))
    assert [int(one.sum()) for one in pasted] == [64, 36, 0]
    assert pasted[1, 14:, :6].all()
