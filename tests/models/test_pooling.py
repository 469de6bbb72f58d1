import pytest
import torch

from m3i_scale.models.pooling import AttentionPool, masked_mean


@pytest.fixture
def pool():
    torch.manual_seed(0)
    pool = AttentionPool(24, 4, 10)
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return pool


def test_pooling_a_part_equals_pooling_that_part_alone(pool):
    tokens = torch.randn(3, 7, 24)
    keep = torch.rand(3, 7) < 0.5
    keep[:, 2] = True
    expected = torch.cat([pool(row[kept][None]) for row, kept in zip(tokens, keep, strict=True)])
    torch.testing.assert_close(pool(tokens, keep), expected)


def test_tokens_left_out_receive_no_gradient_and_may_be_anything(pool):
    tokens = torch.randn(2, 5, 24)
    keep = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    expected = pool(tokens, keep)
    disturbed = torch.where(keep[..., None], tokens, 1e4 * torch.ones(())).requires_grad_()
    out = pool(disturbed, keep)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert not disturbed.grad[~keep].any()
    assert disturbed.grad[keep].any(-1).all()


def test_keeping_everything_is_the_default(pool):
    tokens = torch.randn(2, 5, 24)
    torch.testing.assert_close(pool(tokens, torch.ones(2, 5, dtype=torch.bool)), pool(tokens))


def test_masked_mean_counts_kept_tokens_only():
    tokens = torch.tensor([[[1.0], [5.0], [9.0]]])
    assert masked_mean(tokens, torch.tensor([[True, False, True]])).item() == 5
    assert masked_mean(tokens, torch.tensor([[True, True, False]])).item() == 3


def test_an_empty_row_is_loud(pool):
    keep = torch.tensor([[False, False], [True, False]])
    out = pool(torch.randn(2, 2, 24), keep)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("keep", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)])
def test_bad_keep(pool, keep):
    with pytest.raises(ValueError, match=r"must be bool \(2, 5\)"):
        pool(torch.randn(2, 5, 24), keep)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"width=24.*heads=5"):
        AttentionPool(24, 5, 10)
