from __future__ import annotations

import numpy as np
import pytest

from m3i_scale.objective.masks import PatchMask


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize(("rows", "columns", "ratio"), [(12, 12, 0.5), (7, 5, 0.5), (4, 9, 0.75)])
def test_every_mask_hides_exactly_the_ratio(kind: str, rows: int, columns: int, ratio: float):
    sampler = PatchMask(rows, columns, ratio, kind)
    masks = [sampler(np.random.default_rng(seed)) for seed in range(50)]
    assert {int((~mask).sum()) for mask in masks} == {round(ratio * rows * columns)}
    assert masks[0].shape == (rows, columns)
    assert len({mask.tobytes() for mask in masks}) > 40


def test_a_mask_is_a_function_of_its_generator():
    sampler = PatchMask(12, 12, 0.5, "block")
    first, second = (sampler(np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_blocks_are_contiguous_where_single_patches_are_not():
    def borders(kind: str) -> float:
        """Neighbouring patches that differ, per mask."""
        sampler = PatchMask(12, 12, 0.5, kind)
        masks = np.stack([sampler(np.random.default_rng(seed)) for seed in range(100)])
        return (masks[:, 1:] != masks[:, :-1]).sum((1, 2)).mean()

    assert borders("block") < 0.5 * borders("random")


def test_every_patch_is_hidden_about_equally_often():
    sampler = PatchMask(12, 12, 0.5, "block")
    hidden = 1 - np.mean([sampler(np.random.default_rng(seed)) for seed in range(2000)], axis=0)
    assert hidden.mean() == pytest.approx(0.5)
    assert hidden.min() > 0.35
    assert hidden.max() < 0.65


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 4, 0.0, "block"), "some must be hidden"),
        ((4, 4, 0.99, "block"), "some must be hidden"),
        ((4, 4, 0.5, "stripes"), "stripes"),
    ],
)
def test_an_impossible_mask_is_refused(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        PatchMask(*arguments)
