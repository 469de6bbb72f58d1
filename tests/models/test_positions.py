import itertools
import math

import numpy as np
import pytest
import torch

from m3i_scale.models.positions import (
    grid_embedding,
    grid_positions,
    position_embedding,
    relative_positions,
    sincos_embedding,
)

GRID = (4, 6)
FLIPS = list(itertools.product([False, True], repeat=2))


def painted_patches(box, flip, grid):
    """Source coordinates of each patch of a view, read off an image painted with them."""
    source = np.stack(np.mgrid[:200, :300] + 0.5, -1)  # pixel centres
    top, left, height, width = box
    view = source[top : top + height, left : left + width]
    view = view[:, ::-1] if flip else view
    rows, columns = grid
    view = view.reshape(rows, height // rows, columns, width // columns, 2)
    return view.mean((1, 3))  # (rows, columns, 2)


def where_in(values, painted):
    """Fractional index of `values` in the arithmetic progression `painted`."""
    return (values - painted[0]) / (painted[1] - painted[0])


@pytest.mark.parametrize(("input_flip", "target_flip"), FLIPS)
@pytest.mark.parametrize(
    ("input_box", "target_box"),
    [
        ((10, 20, 80, 120), (30, 60, 40, 60)),
        ((90, 150, 40, 60), (0, 0, 160, 240)),
        ((8, 12, 80, 60), (50, 90, 120, 180)),
    ],
)
def test_positions_are_those_of_a_painted_image(input_box, target_box, input_flip, target_flip):
    painted_input = painted_patches(input_box, input_flip, GRID)
    painted_target = painted_patches(target_box, target_flip, GRID)
    y = where_in(painted_target[..., 0], painted_input[:, 0, 0])
    x = where_in(painted_target[..., 1], painted_input[0, :, 1])
    actual = relative_positions(
        torch.tensor([input_box], dtype=torch.float32),
        torch.tensor([input_flip]),
        torch.tensor([target_box], dtype=torch.float32),
        torch.tensor([target_flip]),
        GRID,
    )[0].view(*GRID, 4)
    np.testing.assert_allclose(actual[..., 0], y, atol=1e-4)
    np.testing.assert_allclose(actual[..., 1], x, atol=1e-4)
    np.testing.assert_allclose(
        actual[..., 2], 10 * math.log(target_box[2] / input_box[2]), atol=1e-4
    )
    np.testing.assert_allclose(
        actual[..., 3], 10 * math.log(target_box[3] / input_box[3]), atol=1e-4
    )


def boxes(n, seed=0):
    rng = np.random.default_rng(seed)
    return torch.tensor(
        rng.uniform([0, 0, 20, 20], [100, 100, 200, 200], (n, 4)), dtype=torch.float32
    )


def test_formula_without_flips_and_mirror_with_a_flipped_input():
    a, b, no, yes = boxes(5), boxes(5, 1), torch.zeros(5).bool(), torch.ones(5).bool()
    rows, columns = GRID
    patch = a[:, 2:] / torch.tensor(GRID)
    origin = (b[:, :2] - a[:, :2]) / patch
    scale = b[:, 2:] / a[:, 2:]
    y = (torch.arange(rows) + 0.5) * scale[:, :1] + origin[:, :1] - 0.5
    x = (torch.arange(columns) + 0.5) * scale[:, 1:] + origin[:, 1:] - 0.5
    plain = relative_positions(a, no, b, no, GRID).view(5, *GRID, 4)
    torch.testing.assert_close(plain[:, :, 0, 0], y, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(plain[:, 0, :, 1], x, atol=1e-4, rtol=1e-5)
    mirrored = relative_positions(a, yes, b, no, GRID).view(5, *GRID, 4)
    torch.testing.assert_close(mirrored[:, 0, :, 1], columns - 1 - x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mirrored[..., [0, 2, 3]], plain[..., [0, 2, 3]])


@pytest.mark.parametrize("flip", [False, True])
def test_the_same_view_has_the_positions_of_its_own_grid(flip):
    box, flips = boxes(3), torch.full((3,), flip)
    actual = relative_positions(box, flips, box, flips, GRID)
    torch.testing.assert_close(actual, grid_positions(GRID).expand(3, -1, -1), atol=1e-5, rtol=0)


def test_a_target_grid_of_its_own():
    box, no = boxes(1), torch.zeros(1).bool()
    actual = relative_positions(box, no, box, no, (4, 4), (2, 2))[0]
    expected = torch.tensor([[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    torch.testing.assert_close(actual[:, :2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual[:, 2:], torch.full((4, 2), 10 * math.log(2)))


def test_embedding_is_four_sine_cosine_parts():
    position = torch.tensor([[1.5, -2.0, 0.3, 4.0]])
    actual = position_embedding(position, 8)[0]
    assert actual.shape == (16,)
    expected = []
    for value in position[0].tolist():
        angles = [value, value / 100]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(actual, torch.tensor(expected))
    own = position_embedding(grid_positions(GRID), 8)
    torch.testing.assert_close(own[:, :8], grid_embedding(GRID, 8))


def test_odd_width():
    with pytest.raises(ValueError, match="width=3"):
        sincos_embedding(torch.zeros(2), 3)
