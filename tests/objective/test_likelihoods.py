"""Each likelihood against a formula written out with loops and numpy-like primitives."""

from __future__ import annotations

import math

import pytest
import torch

from m3i_scale.objective.likelihoods import boltzmann, decorrelation, gaussian, normalise


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_gaussian_is_the_squared_distance_over_two_sigma_squared():
    prediction, target = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    for sigma in (0.5, 1.3):
        found = gaussian(prediction, target, sigma=sigma, over_dimensions="sum")
        assert found.shape == (3, 5)
        for b in range(3):
            for n in range(5):
                square = sum((target[b, n, d] - prediction[b, n, d]).item() ** 2 for d in range(7))
                assert found[b, n].item() == pytest.approx(square / (2 * sigma**2), rel=1e-5)


def test_gaussian_mean_with_unit_variance_halves_is_the_mean_squared_error():
    prediction, target = torch.randn(4, 7), torch.randn(4, 7)
    found = gaussian(prediction, target, sigma=math.sqrt(0.5), over_dimensions="mean").mean()
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(prediction, target))


def test_boltzmann_is_minus_log_softmax_of_the_own_target():
    scores = torch.randn(4, 6, dtype=torch.float64).float()
    positive = torch.tensor([2, -1, 0, 5])
    found = boltzmann(scores, positive)
    for row, column in enumerate(positive.tolist()):
        if column < 0:
            assert found[row] == 0
            continue
        total = sum(math.exp(s) for s in scores[row].tolist())
        expected = -math.log(math.exp(scores[row, column].item()) / total)
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_absent_candidates_leave_the_sum_and_get_no_gradient(smoothing: float):
    scores = torch.randn(3, 5, requires_grad=True)
    exists = torch.tensor([True, False, True, True, False])
    positive = torch.tensor([0, 2, 3])
    found = boltzmann(scores, positive, candidate_exists=exists, label_smoothing=smoothing)
    alone = boltzmann(scores[:, exists], torch.tensor([0, 1, 2]), label_smoothing=smoothing)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert (scores.grad[:, ~exists] == 0).all()


def test_label_smoothing_mixes_in_the_uniform_distribution():
    scores, positive = torch.randn(3, 5), torch.tensor([4, 0, 2])
    plain = boltzmann(scores, positive)
    uniform = -scores.log_softmax(1).mean(1)
    found = boltzmann(scores, positive, label_smoothing=0.1)
    torch.testing.assert_close(found, 0.9 * plain + 0.1 * uniform)


def test_no_row_has_a_target_and_no_candidate_exists():
    scores = torch.randn(2, 3, requires_grad=True)
    found = boltzmann(
        scores, torch.tensor([-1, -1]), candidate_exists=torch.zeros(3, dtype=torch.bool)
    )
    found.sum().backward()
    assert (found == 0).all()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad == 0).all()


def test_decorrelation_of_a_batch_against_loops():
    a, b, weight = torch.randn(16, 3), torch.randn(16, 3), 0.3
    standard = [(x - x.mean(0)) / x.var(0, unbiased=False).sqrt() for x in (a, b)]
    expected = 0.0
    for d in range(3):
        for e in range(3):
            c = (standard[0][:, d] * standard[1][:, e]).mean().item()
            expected += (1 - c) ** 2 if d == e else weight * c**2
    assert decorrelation(a, b, weight=weight).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise_in_float32(dtype: torch.dtype):
    rows = torch.randn(4, 9).to(dtype)
    unit = normalise(rows, "l2")
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(4))
    standard = normalise(rows, "layer_norm")
    torch.testing.assert_close(standard.mean(-1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.var(-1, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalise(rows, "none"), rows.float())
    colour, scale = torch.randn(2, 1, 7).to(dtype), 1 + torch.rand(2, 1, 7).to(dtype)
    shape = torch.randn(2, 9, 7).to(dtype)
    alike = normalise(shape, "instance_norm"), normalise(scale * shape + colour, "instance_norm")
    torch.testing.assert_close(*alike, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0)
    torch.testing.assert_close(alike[0].var(1, unbiased=False), torch.ones(2, 7))
