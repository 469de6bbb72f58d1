"""Stochastic depth is a function of the row's key: equal however rows are spread, and fair."""

from __future__ import annotations

import pytest
import torch

from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.stochastic_depth import DropPath, draw_uniform, hash_keys

CPU = torch.device("cpu")


def split_mix(seed: int, number: int) -> int:
    """Number `number` of SplitMix64 (Steele, Lea, Flood 2014), in unbounded integers."""
    mask = 2**64 - 1
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_hash_is_split_mix():
    # The first numbers of the generator's reference implementation from the seed 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix(1234567, n) for n in range(3)] == known
    for key in (0, 1, 1234567, 2**62 + 12345, -3):
        for number in (0, 1, 2, 7, 2**40, 2**70, -5):
            found = hash_keys(torch.tensor([key]), number).item() % 2**64
            assert found == split_mix(key % 2**64, number % 2**64)
    table = hash_keys(torch.tensor([5, 6]), torch.arange(3)[:, None])
    assert table[2, 1].item() % 2**64 == split_mix(6, 2)


def test_draws_are_uniform_and_independent():
    drawn = draw_uniform(20_000, 8, torch.arange(20_000), CPU)
    assert drawn.shape == (8, 20_000)
    assert ((drawn >= 0) & (drawn < 1)).all()
    histogram = torch.stack([torch.histc(row, 10, 0, 1) for row in drawn]) / 2000 - 1
    assert histogram.abs().max() < 0.12  # four standard deviations of a count are 0.085
    correlation = torch.corrcoef(drawn)
    assert (correlation - torch.eye(8)).abs().max() < 0.03  # branches among each other
    assert torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1].abs() < 0.03


def test_a_branch_is_dropped_whole_and_scaled():
    layer = DropPath(0.25)
    branch = torch.ones(4, 2, 3)
    found = layer(branch, torch.tensor([0.0, 0.2499, 0.25, 0.9]))
    assert found[:, 0, 0].tolist() == pytest.approx([0, 0, 4 / 3, 4 / 3])
    assert torch.equal(layer(branch, None), branch)


SIZES = {
    "vit": {"width": 32, "depth": 3, "heads": 2, "pool_heads": 2, "embed_dim": 24},
    "intern_image": {
        "channels": 8,
        "depths": [1, 1, 2, 1],
        "groups": [1, 2, 4, 8],
        "clip_projector_width": 32,
        "clip_heads": 4,
        "clip_embed_dim": 24,
    },
}


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_rows_draw_alike_in_any_company(name: str, checkpoint_blocks: bool):
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.5, "drop_path_type": "uniform"}
    backbone = build_backbone(name, **SIZES[name], **options, checkpoint_blocks=checkpoint_blocks)
    images, keys = torch.randn(6, 3, 32, 32), torch.arange(6)
    whole = backbone.features(images, keys)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    parts = [backbone.features(images[rows], keys[rows]) for rows in order.split([1, 3, 2])]
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=1e-5, atol=1e-5)
    gradients = []
    for features in (whole[order], torch.cat(parts)):
        backbone.zero_grad()
        torch.randint(2, (7,))  # what others draw in between changes nothing
        features.square().sum().backward()
        found = [p.grad.flatten() for p in backbone.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    other = backbone.features(images, keys + 6)
    assert not torch.allclose(other, whole, atol=1e-3)
    backbone.eval()
    assert torch.equal(backbone.features(images, keys), backbone.features(images, keys + 6))
