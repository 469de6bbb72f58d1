from __future__ import annotations

import pytest
import torch

from helpers.small import random_batch
from m3i_scale.config import Input
from m3i_scale.objective.inputs import build_input

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make(spec: Input, size: int = 4):
    batch = random_batch(size)
    return batch, build_input(batch, spec, mean=MEAN, std=STD, dtype=torch.float32)


def test_a_mix_shows_image_i_where_the_mask_is_true_and_its_neighbour_elsewhere():
    batch, view = make(Input())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for n, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        for r in range(4):
            for c in range(4):
                source = n if batch.mask[n, r, c] else j
                rows, columns = slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16)
                pixels = batch.view_a[source, rows, columns].permute(2, 0, 1).float() / 255
                torch.testing.assert_close(view.image[n, :, rows, columns], (pixels - mean) / std)
    assert view.partner.tolist() == [1, 0, 3, 2]


def test_a_masked_input_is_the_clean_view_with_holes():
    _, view = make(Input(corruption="mask"))
    pixels = (
        view.seen.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand(-1, 3, -1, -1)
    )
    assert torch.equal(view.image[pixels], view.clean_a[pixels])
    assert (view.image[~pixels] == 0).all()


def test_without_corruption_everything_is_seen():
    _, view = make(Input(corruption="none"))
    assert torch.equal(view.image, view.clean_a)
    assert view.seen.all()


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="micro-batch of 3"):
        make(Input(), size=3)
