"""Which patch of the other view a token lies on, by following it through the source image."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.small import random_batch
from m3i_scale.config import Input
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.roles import Role, find_roles, most_similar, nearest_patches

GRID = (3, 3)


def make(spec: Input, size: int = 6) -> MixedBatch:
    batch = random_batch(size, image_size=48)
    return build_input(batch, spec, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.float32)


def patch_under(view: MixedBatch, n: int, token: int, shown: str, target: str) -> int | None:
    """The patch of the target view under the centre of a token; None outside the view."""
    here, there = (view.crop(name, torch.tensor([n])) for name in (shown, target))
    place = []
    for axis, index in ((0, token // 3), (1, token % 3)):
        share = (index + 0.5) / 3
        if axis == 1 and here[1]:
            share = 1 - share
        pixel = here[0][0, axis].item() + share * here[0][0, 2 + axis].item()
        share = (pixel - there[0][0, axis].item()) / there[0][0, 2 + axis].item()
        if axis == 1 and there[1]:
            share = 1 - share
        place.append(math.floor(3 * share))
    inside = all(0 <= p < 3 for p in place)
    return 3 * place[0] + place[1] if inside else None


@pytest.mark.parametrize("shown", ["a", "b"])
@pytest.mark.parametrize("image", ["i", "j"])
def test_nearest_patches(shown: str, image: str):
    view = make(Input())
    role = find_roles(view, shown, Input(), 4, 1)[image]
    target = "b" if shown == "a" else "a"
    index, inside = nearest_patches(role, target, view, GRID)
    outside = 0
    for n in range(6):
        for column, token in enumerate(role.visible[n].tolist()):
            expected = patch_under(view, int(role.sample[n]), token, shown, target)
            assert bool(inside[n, column]) == (expected is not None)
            if expected is None:
                outside += 1
                continue
            assert int(index[n, column]) == expected
    assert 0 < outside < role.visible.numel()  # both cases occur
    assert (index >= 0).all()
    assert (index < 9).all()


def test_in_a_mix_of_an_image_with_itself_image_j_is_the_other_view():
    spec = Input(pairing="self")
    view = make(spec)
    roles = find_roles(view, "a", spec, 4, 1)
    assert (roles["i"].view, roles["j"].view) == ("a", "b")
    assert torch.equal(roles["j"].sample, torch.arange(6))
    pixels = view.seen.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    assert torch.equal(view.image, torch.where(pixels, view.clean_a, view.clean_b))


def test_both_views_are_inputs_one_after_the_other():
    for corruption in ("none", "mask", "mix"):
        spec = Input(corruption=corruption, both_views=True)
        first, second = make(spec).image.chunk(2)
        single = make(Input(corruption=corruption))
        swapped = _swapped(spec)
        assert torch.equal(first, single.image)
        torch.testing.assert_close(second, swapped.image, rtol=0, atol=1e-6)


def _swapped(spec: Input) -> MixedBatch:
    batch = random_batch(6, image_size=48)
    batch.view_a, batch.view_b = batch.view_b, batch.view_a
    plain = spec.model_copy(update={"both_views": False})
    return build_input(batch, plain, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.float32)


def test_shuffled_pairs_are_mutual_and_a_function_of_the_positions():
    spec = Input(pairing="shuffled")
    batch = random_batch(10, image_size=48)
    made = [
        build_input(
            batch.map(lambda t: t), spec, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.float32
        )
        for _ in range(2)
    ]
    partner = made[0].partner
    assert torch.equal(partner, made[1].partner)
    assert torch.equal(partner[partner], torch.arange(10))
    assert (partner != torch.arange(10)).all()
    assert not torch.equal(partner, torch.arange(10) ^ 1)


def test_most_similar_by_loops():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 7), torch.randn(3, 9, 7)
    found = most_similar(a, b)
    for n in range(3):
        for s in range(5):
            cosines = torch.nn.functional.cosine_similarity(a[n, s][None], b[n], dim=1)
            assert found[n, s] == cosines.argmax()


def test_a_role_without_a_view_shows_view_a():
    rows = torch.arange(2)
    assert Role(rows, rows, rows, rows).view == "a"
